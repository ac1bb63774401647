"""Writing files so that a reader never sees half of one, and so that a full disk costs one line, not a traceback."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

from tbcm.errors import UserError

logger = logging.getLogger(__name__)

_TEMPORARY = re.compile(r"\.tbcm-[0-9a-f]{32}-(part|old)(\.\w{1,12})?")
"""The whole name of what is half-written or half-deleted (part), or of a folder that holds, under its own name, what is
being replaced (old). Nobody else gives such names, so what has one may be deleted; nothing else may."""

_FILE_IN_THE_WAY = (
    "a file stands where a folder is needed (or a link that leads nowhere): move it away or choose another folder"
)
_PERMISSION = "permission denied: change its permissions or choose another folder"
_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another folder",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.ENOTDIR: _FILE_IN_THE_WAY,
    errno.EEXIST: _FILE_IN_THE_WAY,
    errno.EISDIR: "a folder stands where a file is needed: move it away or choose another folder",
    errno.ENAMETOOLONG: "the path is too long: choose a shorter one",
    errno.ELOOP: "links lead in a circle: mend them or choose another folder",
    errno.EFBIG: "the file system takes no file of this size: choose another folder",
    errno.EIO: "the disk fails: choose another one",
    errno.ESTALE: "the network file system has lost it: mount it again or choose another folder",
}


def remedy(error: BaseException) -> str | None:
    """What a user can do about `error`, or None if it (and what caused it) is not a failed write that a user can mend.

    Writers wrap the OSError (torch.save) or only quote it (safetensors: "(os error 28)"), so both are looked for.
    """
    seen: BaseException | None = error
    while seen is not None:
        quoted = re.search(r"\(os error (\d+)\)", str(seen))
        number = seen.errno if isinstance(seen, OSError) else int(quoted[1]) if quoted else None
        if number in _REMEDIES:
            return _REMEDIES[number]
        seen = seen.__cause__ or seen.__context__
    return None


@contextmanager
def explain_os_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns ENOSPC, EACCES, EROFS and their like, raised inside, into a one-line `UserError` that names `path`.

    Other errors pass unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        advice = remedy(error)
        if advice is None:
            raise
        raise UserError(f"cannot write {os.fspath(path)}: {advice}") from error


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path` (same suffix) for the caller to write a file to.

    On success the file is synced to disk and takes `path`'s place in one step; on failure it is removed and an old
    file at `path` is left as it was. Missing parent folders are made. A link at `path` is replaced, not followed.

    Raises:
        UserError: the disk is full or read-only, or permission is missing.
    """
    path = Path(path)
    part = temporary(path)
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            _sync(part)
            part.replace(path)
            _sync(path.parent)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a new, empty temporary folder beside `path`; on success it takes `path`'s place, on failure it is removed.

    Everything in it is synced to disk first. What is at `path` already is replaced (and gone for an instant; a reader
    never sees a mixture): of a link the link alone, not what it leads to.

    Raises:
        UserError: the disk is full or read-only, or permission is missing.
    """
    path = Path(path)
    part, old = temporary(path), temporary(path, "old")
    with explain_os_errors(path):
        part.mkdir(parents=True)
        try:
            yield part
            _sync_tree(part)
            if os.path.lexists(path):
                old.mkdir()
                path.replace(old / path.name)
            part.replace(path)
            _sync(path.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            with suppress(OSError):
                _put_back(old)
                old.rmdir()
            raise
        discard(old)


def temporary(path: Path, kind: Literal["part", "old"] = "part") -> Path:
    """A new name beside `path`, which `remove_leftovers` knows. Short, so that any `path` has one."""
    # Random, not the process id: those repeat across the hosts and containers that share a file system.
    suffix = path.suffix if kind == "part" and re.fullmatch(r"\.\w{1,12}", path.suffix) else ""
    return path.with_name(f".tbcm-{secrets.token_hex(16)}-{kind}{suffix}")


def remove_leftovers(*folders: Path) -> None:
    """Removes what a process that was killed while it wrote or deleted has left in these, but not below, and puts back
    what it had not replaced yet. Each is logged; what cannot be removed is a warning.

    For who holds the folders' `RunLock`: nobody else may be writing there.
    """
    for path in [path for folder in folders for path in _leftovers(folder)]:
        try:
            for restored in _put_back(path):
                logger.warning("%s: put back as it was before a process that replaced it was killed", restored)
        except OSError as error:
            _stays(path, error)
        else:
            if discard(path):
                logger.info("%s: removed; a process that was killed had left it", path)


def discard(path: Path) -> bool:
    """Deletes what is at `path`, if anything, so that a kill leaves nothing half-deleted under that name. Of a link,
    the link alone. Returns whether it is gone; that it is not is a warning, once."""
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return True
        doomed = path if _TEMPORARY.fullmatch(path.name) else path.rename(temporary(path))
    except OSError as error:
        _stays(path, error)
        return False
    try:
        shutil.rmtree(doomed)
    except OSError as error:
        shutil.rmtree(doomed, ignore_errors=True)  # all that can be, such as all but what a network disk holds open
        _stays(doomed, error)
    return not doomed.exists()


def _leftovers(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if _TEMPORARY.fullmatch(path.name))
    except OSError:  # there is no such folder; or whoever writes to it will be told
        return []


def _put_back(old: Path) -> list[Path]:
    """What `old` holds (see `temporary`) and nothing has taken the place of."""
    match = _TEMPORARY.fullmatch(old.name)
    if not match or match[1] != "old" or old.is_symlink() or not old.is_dir():
        return []
    kept = [(path, old.with_name(path.name)) for path in old.iterdir()]
    return [path.rename(place) for path, place in kept if not os.path.lexists(place)]


_warned: set[Path] = set()


def warn_once(path: Path, message: str) -> None:
    """Logs a warning, "`path` `message`", unless there was one of `path` before."""
    if path not in _warned:
        _warned.add(path)
        logger.warning("%s %s", path, message)


def _stays(path: Path, error: OSError) -> None:
    warn_once(path, f"cannot be removed ({error.strerror or error}): it stays")


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes `obj` as indented JSON, atomically."""
    text = json.dumps(obj, indent=2) + "\n"
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for child in folder.rglob("*"):
        _sync(child)
    _sync(folder)
