"""Jobs that tests start and kill: a process by itself, or torchrun's agents and their ranks (Linux: /proc).

A job is started as a user starts it, or forked from this process, which has imported already what takes a user's
processes most of their start. Either way an agent is torchrun's own, and its ranks are processes of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[2]
Process = BaseProcess | subprocess.Popen[bytes]
# Of several agents the ranks must not meet in an agent's store, which outlives them: after a restart they find there
# the addresses of those before them, or, where the agents' order has changed, wait for each other in different stores.
_SEVERAL_AGENTS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
Start = Callable[["Layout", list[str], int, Path], list[Process]]


@dataclass(frozen=True)
class Layout:
    """`nodes` agents with `ranks` ranks each; no nodes: one process without torchrun."""

    nodes: int
    ranks: int = 1


def start_torchrun(layout: Layout, arguments: list[str], restarts: int, log: Path) -> list[Process]:
    """tbcm.train with `arguments` as a command line. Returns the agents (or the one process)."""
    train = ["-m", "tbcm.train", *arguments]
    if not layout.nodes:
        return [_open([sys.executable, *train], {}, log)]
    rendezvous = [f"--rdzv_{key}={value}" for key, value in _rendezvous(layout).items()]
    agent = [sys.executable, "-m", "torch.distributed.run", "--local_addr=127.0.0.1", f"--max_restarts={restarts}"]
    agent += [f"--nnodes={layout.nodes}", f"--nproc_per_node={layout.ranks}", *rendezvous, *train]
    environment = _SEVERAL_AGENTS if layout.nodes > 1 else {}
    return [_open(agent, environment, log) for _ in range(layout.nodes)]


def start_forked(layout: Layout, arguments: list[str], restarts: int, log: Path) -> list[Process]:
    """The same, in seconds less. This process must have no threads and no process group."""
    fork = multiprocessing.get_context("fork")
    options = _rendezvous(layout)
    if layout.nodes:
        agent = layout, options, arguments, restarts, log
        processes = [fork.Process(target=_agent, args=agent) for _ in range(layout.nodes)]
    else:
        processes = [fork.Process(target=_alone, args=(arguments, log))]
    for process in processes:
        process.start()
    return list(processes)


def _open(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=ROOT, start_new_session=True)


def _rendezvous(layout: Layout) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"backend": "c10d", "endpoint": f"127.0.0.1:{port}", "id": uuid.uuid4().hex[:8]}


def _agent(layout: Layout, rendezvous: dict[str, str], arguments: list[str], restarts: int, log: Path) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _detach(log)
    if layout.nodes > 1:
        os.environ |= _SEVERAL_AGENTS
    config = LaunchConfig(
        min_nodes=layout.nodes,
        max_nodes=layout.nodes,
        nproc_per_node=layout.ranks,
        rdzv_backend=rendezvous["backend"],
        rdzv_endpoint=rendezvous["endpoint"],
        run_id=rendezvous["id"],
        max_restarts=restarts,
        local_addr="127.0.0.1",
        start_method="fork",
    )
    elastic_launch(config, _rank)(arguments)


def _alone(arguments: list[str], log: Path) -> None:
    _detach(log)
    _rank(arguments)


def _detach(log: Path) -> None:
    os.setsid()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def as_a_process_of_its_own() -> None:
    """In a fork of an agent: not the agent's handlers, nor the SIGINT that its death sends to a fork."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pdeathsig = 1
    ctypes.CDLL(None).prctl(pdeathsig, 0)


def _rank(arguments: list[str]) -> None:
    from tbcm import train

    as_a_process_of_its_own()
    sys.argv = ["tbcm.train", *arguments]
    sys.exit(train.main())


# Processes


def exit_code(process: Process) -> int | None:
    """None while it runs; -9 after SIGKILL."""
    return process.exitcode if isinstance(process, BaseProcess) else process.poll()


def ranks(agent: Process) -> list[int]:
    """The process ids of a living agent's ranks, in the order of their start."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        return sorted(int(pid) for pid in children if isinstance(agent, BaseProcess) or b"tbcm.train" in _command(pid))
    return []


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` came true within so many seconds."""
    return any(condition() for _ in every(0.02, seconds)) or condition()


def every(period: float, seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(period)


def _command(pid: str) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
