"""Functions on several ranks of this machine, over gloo."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import warm_processes  # noqa: F401  (what they start from)
from torch import multiprocessing

from tbcm.runtime import distributed


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def on_ranks(world: int, function: Callable[..., None], *arguments: Any) -> None:
    """`function(*arguments)` on each of `world` new processes, which form a process group. It must pickle."""
    start = world, free_port(), function, arguments
    multiprocessing.start_processes(_rank, start, nprocs=world, start_method="forkserver")


def _rank(rank: int, world: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init("cpu")
    function(*arguments)
    distributed.shutdown()
