"""A write that fails costs one line, which says what to do, and no traceback."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from tbcm.errors import UserError

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
