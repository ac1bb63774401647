"""One process to an output folder."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tbcm.errors import UserError
from tbcm.runtime.write_errors import explain_os_errors

logger = logging.getLogger(__name__)


class RunLock:
    """Holds an output folder for one process; a second one is refused. The kernel lets go when the process dies.

        with RunLock("out/run1"): ...

    Raises (on acquiring):
        UserError: another process holds the folder, or the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._file: TextIO | None = None

    def acquire(self) -> None:
        with explain_os_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            # Appending, not writing: if we are refused, the owner's name in it must stay.
            file = (self.folder / ".lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"output folder {self.folder} is in use by {owner}: stop it, wait for it, or choose another folder"
            ) from None
        except OSError as error:  # some cluster file systems are mounted without locks; a run must still be possible
            logger.warning("%s cannot be locked (%s): do not start a second run in it", self.folder, error.strerror)
        with explain_os_errors(self.folder):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
