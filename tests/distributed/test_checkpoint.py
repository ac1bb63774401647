"""Checkpoints of several ranks (gloo, spawned): written once, resharded, whole whatever becomes of a rank."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import free_port, on_ranks
from torch import Tensor, multiprocessing, nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tbcm.errors import UserError
from tbcm.runtime import checkpoint, distributed
from tbcm.runtime.checkpoint_writer import CheckpointWriter
from tbcm.runtime.ema import EMA
from tbcm.runtime.files import write_json
from tbcm.runtime.guard import NonFiniteGuard
from tbcm.runtime.optimizer import build_optimizer, clip_and_check, gated_step
from tbcm.runtime.seeding import generator

MESHES: dict[str, tuple[int, ...]] = {"fsdp2": (2,), "fsdp4": (4,), "hsdp": (2, 2)}
LAYOUTS = {1: ["single"], 2: ["single", "fsdp2"], 4: ["single", "fsdp4", "hsdp"]}
"""By number of ranks; "single" is what one process has, on each of them."""


class Run:
    """A student with everything that a trainer keeps. Its shapes do not divide by ranks, and some ranks hold nothing
    of a bias."""

    def __init__(self, layout: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3))
        self.model.register_buffer("calls", torch.tensor(0))
        if layout in MESHES:
            names = ("replicate", "shard")[-len(MESHES[layout]) :]
            fully_shard(self.model, mesh=init_device_mesh("cpu", MESHES[layout], mesh_dim_names=names))
        self.optimizer = build_optimizer("adamw", self.model.parameters(), lr=1e-2, weight_decay=0.1)
        self.ema = EMA(self.model)
        self.guard = NonFiniteGuard(5)
        self.schedule: dict[str, Any] = {"phase": "warm", "seen": {"samples": 0, "share": 0.0}}

    @property
    def state(self) -> dict[str, Any]:
        parts = {"student": self.model, "optimizer": self.optimizer, "ema": self.ema, "guard": self.guard}
        return parts | {"schedule": self.schedule}

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.model.get_buffer("calls").add_(1)
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            x = torch.randn(8, 5, generator=generator("cpu", 0, step, "x"))
            self.optimizer.zero_grad()
            (self.model(x).square().mean() * (float("nan") if step == 1 else 1)).backward()
            _, finite = clip_and_check(self.model.parameters(), 1.0)
            gated_step(self.optimizer, finite)
            self.ema.update(self.model, finite)
            self.guard.update(finite)
            self.schedule["seen"] = {"samples": 8 * (step + 1), "share": (step + 1) / 10}

    def whole(self) -> dict[str, Any]:
        """Tensors and numbers by name, none of them sharded."""
        found: dict[str, Any] = {}

        def collect(name: str, value: Any) -> None:
            if isinstance(value, Tensor):
                found[name] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
            elif isinstance(value, dict | list | tuple):
                for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                    collect(f"{name}.{key}", inner)
            else:
                found[name] = value

        for name, part in self.state.items():
            collect(name, part.state_dict() if hasattr(part, "state_dict") else part)
        return found


def difference(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names whose values are not the same, bit for bit."""

    def same(a: Any, b: Any) -> bool:
        return a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, Tensor) else a == b

    common = one.keys() & other.keys()
    return sorted((one.keys() ^ other.keys()) | {name for name in common if not same(one[name], other[name])})


@contextmanager
def streams(before: Any) -> Iterator[None]:
    """Calls `before()` each time that this process opens a file of tensors."""
    open_file = FileSystem.create_stream

    def create_stream(self: FileSystem, path: Path, mode: str) -> Any:
        before()
        return open_file(self, path, mode)

    FileSystem.create_stream = create_stream  # type: ignore[method-assign]
    try:
        yield
    finally:
        FileSystem.create_stream = open_file  # type: ignore[method-assign]


# Resharding


def save_layouts(folder: Path) -> None:
    """Each layout of this number of ranks, while the training goes on."""
    for layout in LAYOUTS[distributed.world_size()]:
        name = f"{distributed.world_size()}-{layout}"
        run = Run(layout)
        run.train(0, 3)
        writer = CheckpointWriter(folder / name)
        expected = run.whole()
        with streams(lambda: time.sleep(0.2)):
            writer.save(3, run.state, {})
            run.train(3, 5)
            writer.wait()
        assert writer.saved == (3, folder / name / "checkpoints" / "step-00000003")
        if distributed.is_main():
            torch.save(expected, folder / name / "expected.pt")


def load_all(folder: Path, saved_by: str = "") -> None:
    """What that number of ranks (default: any) saved, in every layout, into each layout of this number."""
    for layout in LAYOUTS[distributed.world_size()]:
        for saved in sorted(folder.glob(f"{saved_by}*-*")):
            run = Run(layout, seed=1)
            run.train(0, 1)
            assert checkpoint.load(saved, run.state)["step"] == 3
            different = difference(torch.load(saved / "expected.pt"), run.whole())
            assert not different, f"{saved.name} as {layout}: {different}"
            run.train(3, 4)  # what was loaded can be trained


def reshard(folder: Path, ports: list[int]) -> None:
    """As 4 ranks, then 2 of them, then 4 again: starting processes is what takes the time."""
    rank = distributed.rank()
    load_all(folder, saved_by="1")
    save_layouts(folder)
    distributed.shutdown()
    if rank < 2:
        join(rank, 2, ports[0])
        load_all(folder)
        save_layouts(folder)
        distributed.shutdown()
    join(rank, 4, ports[1])
    load_all(folder, saved_by="2")


def join(rank: int, world: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init("cpu")


def test_any_number_of_ranks_loads_what_any_other_saved(tmp_path: Path) -> None:
    save_layouts(tmp_path)
    on_ranks(4, reshard, tmp_path, [free_port(), free_port()])
    load_all(tmp_path)

    # Who wrote: with shards every rank and each thing once, else rank 0.
    sizes = {}
    for name in ("1-single", "2-single", "4-single", "2-fsdp2", "4-fsdp4", "4-hsdp"):
        path = tmp_path / name / "checkpoints" / "step-00000003"
        manifest = json.loads((path / "manifest.json").read_text())
        writers = {file.split("_")[2] for file in manifest["files"] if file.endswith(".distcp")}
        ranks, layout = name.split("-")
        assert (manifest["ranks"], manifest["sharded"]) == (int(ranks), layout != "single")
        assert writers == ({"0"} if layout == "single" else {str(rank) for rank in range(int(ranks))})
        metadata = torch.distributed.checkpoint.FileSystemReader(path).read_metadata()
        sizes[name] = sum(
            chunk.sizes.numel() * entry.properties.dtype.itemsize
            for entry in metadata.state_dict_metadata.values()
            if hasattr(entry, "chunks")
            for chunk in entry.chunks
        )
    assert len(set(sizes.values())) == 1
    assert sizes["1-single"] > 4 * 4 * (5 * 7 + 7 + 7 * 3 + 3)


# Failures


def fill_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def meet_full_disks(folder: Path) -> None:
    """The disk of one rank is full: rank 1's with shards, rank 0's without. Every rank learns of it."""
    for layout, unlucky in {"fsdp2": 1, "single": 0}.items():
        run, writer = Run(layout), CheckpointWriter(folder / layout)
        writer.save(1, run.state, {})
        writer.wait()
        with streams(lambda unlucky=unlucky: fill_disk() if distributed.rank() == unlucky else None):
            writer.save(2, run.state, {})
            with pytest.raises(UserError, match=r"cannot write .*step-00000002: the disk is full") as caught:
                writer.save(3, run.state, {})
        assert "\n" not in str(caught.value)
        distributed.barrier()  # now rank 0 has tidied up
        assert [path.name for path in (folder / layout / "checkpoints").iterdir()] == ["step-00000001"]
        distributed.barrier()
        writer.save(4, run.state, {})
        writer.wait()
        assert writer.saved
        assert writer.saved[0] == 4


def meet_damage(folder: Path) -> None:
    """A flipped bit in the share that rank 1 reads, or wrote: every rank takes the checkpoint before."""
    run = Run("fsdp2")
    for step in (1, 2):
        checkpoint.save(folder / "damaged", step, run.state, config={})
    newest = folder / "damaged" / "checkpoints" / "step-00000002"
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp"):
        distributed.run_on_main(lambda name=name: flip_a_bit(newest / name))
        assert checkpoint.latest(folder / "damaged") == newest.with_name("step-00000001")
        with pytest.raises(UserError, match=f"{name} is damaged"):
            checkpoint.load(newest, run.state)
        distributed.run_on_main(lambda name=name: flip_a_bit(newest / name))
        assert checkpoint.latest(folder / "damaged") == newest


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def two_unlucky_ranks(folder: Path) -> None:
    meet_full_disks(folder)
    meet_damage(folder)


def test_what_befalls_one_rank_every_rank_learns(tmp_path: Path) -> None:
    on_ranks(2, two_unlucky_ranks, tmp_path)


def survive(rank: int, port: int, folder: Path) -> None:
    """Rank 1 stops during a save, then is killed; rank 0 says what it was told, and leaves with a save in flight."""
    torch.set_num_threads(1)
    join(rank, 2, port)
    run, writer = Run("fsdp2"), CheckpointWriter(folder, timeout=timedelta(seconds=10))
    writer.save(1, run.state, {})
    writer.wait()
    if rank == 1:
        with streams(lambda: os.kill(os.getpid(), signal.SIGSTOP)):
            writer.save(2, run.state, {})
            writer.wait()
    for report in ("silent", "dead"):
        started = time.monotonic()
        writer.save(2, run.state, {})
        with pytest.raises(UserError) as caught:
            writer.wait()
        write_json(folder / f"{report}.json", {"said": str(caught.value), "seconds": time.monotonic() - started})
        while report == "silent" and not (folder / "killed").exists():
            time.sleep(0.05)
    writer.save(3, run.state, {})
    raise SystemExit(3)


def until(condition: Any) -> None:
    while not condition():
        time.sleep(0.05)


def test_a_rank_that_stops_or_dies_during_a_save_is_not_waited_for(tmp_path: Path) -> None:
    port, context = free_port(), multiprocessing.get_context("spawn")
    ranks = [context.Process(target=survive, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        until(lambda: (tmp_path / "silent.json").exists() or not ranks[0].is_alive())
        ranks[1].kill()
        ranks[1].join()
        (tmp_path / "killed").touch()
        ranks[0].join()
        assert ranks[0].exitcode == 3
    finally:
        for process in ranks:
            process.kill()
    for report, least, most in (("silent", 2.5, 120), ("dead", 0, 120)):
        told = json.loads((tmp_path / f"{report}.json").read_text())
        assert "another rank has died or does not answer" in told["said"]
        assert least < told["seconds"] < most
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-00000001"
    assert checkpoint.load(tmp_path, Run("single").state)["step"] == 1
