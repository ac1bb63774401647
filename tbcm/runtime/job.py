"""What the commands that fill a folder, on any number of ranks, have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch

from tbcm.runtime import distributed
from tbcm.runtime.lock import RunLock
from tbcm.runtime.log import setup_logging


@contextmanager
def job(out: str | Path, device_type: str | None) -> Iterator[torch.device]:
    """Joins the ranks, locks the folder `out` and yields this rank's device. Every rank enters it, in a command whose
    errors are `failure.reported`."""
    device = distributed.init(device_type, timeout=timedelta(days=1))  # one rank may work while the others wait
    setup_logging()
    lock = RunLock(out)
    distributed.run_on_main(lock.acquire)
    try:
        yield device
        distributed.shutdown()  # not after an error: the other ranks may be stuck, and `failure` ends this one
    finally:
        lock.release()
