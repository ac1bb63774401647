"""Ways to take the same training step on several ranks, with their exchange and without, in turns."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed import fake_pg  # noqa: F401  (makes the backend "fake" known)

from speed import arms
from speed.collectives import Collectives, Traffic
from speed.measure import WARM_UP, parts, quiet
from tbcm.config import Config
from tbcm.runtime import distributed, parallel
from tbcm.runtime.files import write_json
from tbcm.setup.networks import build_student
from tbcm.training.trainer import Trainer

SINGLE = "single"


@dataclass(frozen=True)
class Task:
    """`prompts` of each rank, with `points` of a route; `steps` of each arm are measured."""

    model: str
    modes: Sequence[str]
    prompts: int
    points: int
    steps: int
    device_type: str


@dataclass(frozen=True)
class RankArm:
    """`trainer` is None where this rank only waits for those that take the step."""

    name: str
    trainer: Trainer | None
    inside: Callable[[], AbstractContextManager[object]] = nullcontext

    def step(self) -> None:
        if self.trainer is not None:
            with self.inside():
                self.trainer.train_step()


def without(mode: str) -> str:
    """The name of a mode's arm that does the same work and exchanges nothing."""
    return f"{mode} without exchange"


def run(task: Task, world: int, result: Path) -> None:
    """Measures on `world` new processes, which form a process group, and writes a JSON file: "seconds" of each step by
    arm (of a step, those of the last rank to end it), and "traffic" by mode and kind, as [count, bytes]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(_rank, (world, port, task, result), nprocs=world, start_method="forkserver")


def _rank(rank: int, world: int, port: int, task: Task, result: Path) -> None:
    if task.device_type == "cpu":
        torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = distributed.init(task.device_type)
    quiet()
    figures = measure(task, device)
    if distributed.is_main():
        write_json(result, figures)
    distributed.shutdown()


def measure(task: Task, device: torch.device) -> dict[str, Any]:
    """On one of the ranks; see `run`."""
    made = rank_arms(task, device)
    traffic: dict[str, dict[str, Traffic]] = {}
    for arm in made:
        for _ in range(WARM_UP):
            arm.step()
        if arm.name in task.modes:
            with Collectives() as collectives:
                arm.step()
            traffic[arm.name] = collectives.traffic
    seconds = torch.tensor([[_timed(arm, device) for arm in made] for _ in range(task.steps)], dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return {
        "seconds": {arm.name: seconds[:, index].tolist() for index, arm in enumerate(made)},
        "traffic": traffic,
    }


def rank_arms(task: Task, device: torch.device) -> list[RankArm]:
    """Rank 0 by itself; then each mode, with and without what it exchanges.

    Without means that as many ranks do the same work at the same time, so that they still compete for cores, memory and
    power: DDP in `no_sync`, FSDP over a process group that copies its own shard to where the others' belong.
    """
    world = distributed.world_size()
    shared = parts(configuration(task, world, "ddp"), device)

    def trainer(ranks: int, mode: str) -> Trainer:
        config = configuration(task, ranks, mode)
        return Trainer(config, device, replace(shared, student=build_student(config, shared.teacher)))

    with distributed.alone():
        made = [RankArm(SINGLE, None if dist.get_rank() else trainer(1, "ddp"), distributed.alone)]
    for mode in task.modes if world > 1 else ():
        exchanging = idle = trainer(world, mode)
        if mode == "fsdp":
            with patch.object(parallel, "device_mesh", _mesh_without_exchange):
                idle = trainer(world, mode)
        made += [RankArm(mode, exchanging), RankArm(without(mode), idle, partial(_silent, idle.wrapped))]
    return made


def configuration(task: Task, ranks: int, mode: str) -> Config:
    """What is fastest on a GPU; on a CPU the same without compilation, which would take longer than the measurement.

    AdamW works element by element, so that on shards it does the same and exchanges nothing of its own.
    """
    device = torch.device(task.device_type)
    arm = "fast" if device.type == "cuda" else "no_recompute"
    config = arms.config(task.model, arm, "tbcm", ranks * task.prompts * (task.points - 1), task.points, device)
    return config.model_copy(
        update={
            "optimizer": config.optimizer.model_copy(update={"name": "adamw"}),
            "parallel": config.parallel.model_copy(update={"mode": mode, "shard": ranks}),
            "checkpoint": config.checkpoint.model_copy(update={"asynchronous": False}),  # no process group of its own
        }
    )


def _mesh_without_exchange(device_type: str, shard: int) -> DeviceMesh:
    return init_device_mesh(device_type, (shard,), mesh_dim_names=("shard",), backend_override={"shard": "fake"})


@contextmanager
def _silent(net: torch.nn.Module) -> Iterator[None]:
    inner = net.no_sync() if isinstance(net, DistributedDataParallel) else nullcontext()
    with distributed.alone(), inner:
        yield


def _timed(arm: RankArm, device: torch.device) -> float:
    """Seconds of a step that all ranks begin together."""
    distributed.any_rank(False)
    started = time.perf_counter()
    arm.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started if arm.trainer else 0.0
