from __future__ import annotations

import errno
import faulthandler
import os
import signal
from collections.abc import Iterator

import pytest

from tbcm.runtime.interrupt import StopRequest


@pytest.fixture(autouse=True)
def _as_from_a_terminal() -> Iterator[None]:
    """nohup ignores SIGHUP for all that it starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


SIGNALS = [getattr(signal, f"SIG{name}") for name in ("INT", "TERM", "HUP", "USR1", "USR2", "XCPU")]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_only_asks(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        assert not stop.stop_requested
        os.kill(os.getpid(), number)
        assert stop.stop_requested
    assert "stopping after this step" in capfd.readouterr().err


def test_the_second_ctrl_c_ends_at_once() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.stop_requested


@pytest.mark.parametrize("number", SIGNALS[1:])
def test_a_repeated_signal_goes_on_asking(number: int) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.stop_requested


@pytest.mark.parametrize("number", SIGNALS[2:])
def test_what_is_ignored_stays_ignored(number: int) -> None:
    """As nohup has it with SIGHUP."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), number)
            assert not stop.stop_requested
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_handler_that_is_not_pythons_stays() -> None:
    faulthandler.register(signal.SIGUSR2)
    try:
        with StopRequest():
            assert signal.getsignal(signal.SIGUSR2) != signal.SIG_DFL
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        faulthandler.unregister(signal.SIGUSR2)


def test_a_terminal_that_has_gone_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(descriptor: int, data: bytes) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "write", gone)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.stop_requested


def test_the_handlers_found_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), StopRequest():  # noqa: PT012
        assert signal.getsignal(signal.SIGINT) != before[0]
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in SIGNALS] == before
