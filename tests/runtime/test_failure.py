"""In a process of its own; what happens under torchrun is in tests/distributed/test_faults.py."""

from __future__ import annotations

import logging

import pytest

from tbcm.errors import UserError
from tbcm.runtime import failure


@pytest.mark.parametrize("error", [ValueError("no"), UserError("mend it"), KeyboardInterrupt(), SystemExit(2)])
def test_outside_torchrun_errors_go_on(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def main() -> int:
        raise error

    with pytest.raises(type(error)):
        failure.reported(main)()
    assert failure.reported(lambda: 3)() == 3


def test_the_traceback_goes_to_the_log_file(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    failure.file_logger.addHandler(caplog.handler)
    try:
        with pytest.raises(ZeroDivisionError):
            failure.reported(lambda: 1 // 0)()
    finally:
        failure.file_logger.removeHandler(caplog.handler)
    assert "ZeroDivisionError" in caplog.text and caplog.records[0].levelno == logging.ERROR


def test_a_lost_peer_is_told_from_other_errors() -> None:
    gloo = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1189. GLHF!")
    assert failure._lost_a_peer(gloo)
    wrapped = UserError("cannot write step-00000003")
    wrapped.__cause__ = gloo
    assert failure._lost_a_peer(wrapped)
    assert not failure._lost_a_peer(ConnectionResetError("Connection reset by peer"))  # a download
    assert not failure._lost_a_peer(RuntimeError("shape mismatch"))
