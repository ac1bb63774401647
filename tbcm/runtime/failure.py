"""The end of a rank that failed: at once, and with its rank, host, step and traceback wherever someone will look."""

from __future__ import annotations

import faulthandler
import functools
import json
import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from tbcm.errors import UserError
from tbcm.runtime import signs

logger = logging.getLogger("tbcm")
file_logger = logging.getLogger("tbcm.file")
"""Writes to the rank's own log file alone (`log.log_to_file`), not to the console."""
file_logger.addHandler(logging.NullHandler())
file_logger.propagate = False

_LAST_SECONDS = 5.0  # for writing last words: what it takes may hang too (a full pipe, a lock, a lost file system)
_PEER_LOST = re.compile(
    r"closed by peer|reset by peer|Broken pipe|Timed out waiting|ncclRemoteError|Connection refused"
)


def name() -> str:
    """ "rank 3 of 8 (host)"."""
    return f"rank {os.environ.get('RANK', 0)} of {os.environ.get('WORLD_SIZE', 1)} ({socket.gethostname()})"


def reported(main: Callable[[], int | None]) -> Callable[[], int | None]:
    """Decorates a command line's `main`: under torchrun any error in it ends this process at once.

    The process group is not touched, since leaving it may hang when a rank has failed: torchrun sees the exit code and
    ends the others. Rank, host, step and traceback go to the console, to the rank's log file, to torchrun's summary
    and to the other ranks. Exit code 2 for a `UserError` (its one line), 1 for other errors.

    A process of its own only writes the traceback to its log file, and raises on.
    """

    @functools.wraps(main)
    def run() -> int | None:
        is_rank = "WORLD_SIZE" in os.environ
        signs.pulse.parent = os.getppid()  # before imports that take seconds, in which it may die
        if is_rank:
            faulthandler.enable()  # a crash in C shows where Python was
        try:
            return main()
        except SystemExit:
            raise
        except BaseException as error:
            if is_rank:
                _end_rank(error)
            file_logger.exception("failed at step %d", signs.pulse.step)
            raise

    return run


@contextmanager
def noted() -> Iterator[None]:
    """Writes an error inside to this rank's log file at once, before anything that waits on the way out."""
    try:
        yield
    except Exception:
        file_logger.exception("failed at step %d; what is being written is finished first", signs.pulse.step)
        raise


def end(code: int, summary: str, detail: str = "", *, console: bool = True) -> NoReturn:
    """Ends this process with exit code `code`, within 5 s whatever else hangs.

    Args:
        summary: one line.
        detail: lines under it: a traceback.
        console: False if the console has it already.
    """
    _exit_after(_LAST_SECONDS, code)
    try:
        text = f"{summary}\n{detail}".rstrip()
        _write_error_file(summary, text)
        (logger if console else file_logger).critical("%s", text)
        if signs.board is not None:
            signs.pulse.last_words = text
            with suppress(RuntimeError):  # the store may be what is gone
                signs.board.publish(signs.pulse)
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def _end_rank(error: BaseException) -> NoReturn:
    step = signs.pulse.step
    if isinstance(error, KeyboardInterrupt):
        end(130, f"{name()} was interrupted at step {step}")
    if _lost_a_peer(error):
        _exit_after(3 * _LAST_SECONDS, 1)  # the store may be gone, too
        file_logger.error("%s lost the connection to another rank at step %d", name(), step, exc_info=error)
        # Of a node's ranks one tells it on the console. As it takes its time, the first place in torchrun's summary
        # is left to the rank that is gone.
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        end(1, f"{name()} lost the connection to another rank at step {step}: {_who_is_gone()}", console=first)
    if isinstance(error, UserError):
        rank = int(os.environ.get("RANK", 0))
        print(f"[rank {rank}] error: {error}" if rank else f"error: {error}", file=sys.stderr)
        end(2, f"error: {error}", console=False)
    last_line = " ".join("".join(traceback.format_exception_only(error)).split())
    end(1, f"{name()} failed at step {step}: {last_line}", "".join(traceback.format_exception(error)))


def _lost_a_peer(error: BaseException | None) -> bool:
    """Whether a collective failed, in `error` or in what caused it, because another rank is gone."""
    if error is None:
        return False
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return (isinstance(error, RuntimeError) and bool(_PEER_LOST.search(str(error)))) or _lost_a_peer(cause)


def _who_is_gone() -> str:
    board = signs.board
    if board is None:
        return "torchrun or that rank's log says why"
    signs.pulse.beat(signs.pulse.step)  # the watchdog is to let this process look
    try:
        before = board.read()
        time.sleep(3 * board.interval)
        found = signs.gone(before, board.read(), board.rank)
    except RuntimeError as error:
        return f"so is torchrun's store on {os.environ.get('MASTER_ADDR')}, so its node may be lost ({error})"
    return (
        "; ".join(reason.splitlines()[0] for reason in found)
        or "all still give signs of life, so the network between them failed"
    )


def _exit_after(seconds: float, code: int) -> None:
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()


def _write_error_file(summary: str, text: str) -> None:
    """What torchrun shows of this rank (torch.distributed.elastic.multiprocessing.errors reads it)."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": summary, "extraInfo": extra}}), encoding="utf-8")
