"""New processes that start in a tenth of a second: a server forks them that has done the imports, which take ten."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

multiprocessing.set_forkserver_preload(["tbcm.train", "tbcm.evaluate", "tbcm.training.random_parts"])


@contextmanager
def started(function: Callable[..., None], *arguments: Any) -> Iterator[BaseProcess]:
    """`function(*arguments)`, which must pickle, in a new process that has gone afterwards, whatever happens.

    It has the environment of the first such process: what it needs in its own, it is to be given.
    """
    process = multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()
