from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystem

from tbcm.errors import UserError
from tbcm.runtime import checkpoint
from tbcm.runtime.ema import EMA
from tbcm.runtime.guard import NonFiniteGuard
from tbcm.runtime.optimizer import build_optimizer, clip_and_check, gated_step
from tbcm.runtime.seeding import generator


class Run:
    """A student with everything that a trainer keeps; `seed` moves the start, so that a load must undo it."""

    def __init__(self, optimizer: str = "adamw", seed: int = 0, width: int = 6) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Conv2d(2, width, 3), nn.SiLU(), nn.Conv2d(width, width, 3), nn.GroupNorm(2, width)
        )
        self.model.register_buffer("calls", torch.tensor(0))
        self.optimizer = build_optimizer(optimizer, self.model.parameters(), lr=1e-2, weight_decay=0.1)
        self.ema = EMA(self.model)
        self.guard = NonFiniteGuard(5)

    @property
    def state(self) -> dict[str, Any]:
        return {"student": self.model, "optimizer": self.optimizer, "ema": self.ema, "guard": self.guard}

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.model.get_buffer("calls").add_(1)
            x = torch.randn(4, 2, 8, 8, generator=generator("cpu", 0, step, "x"))
            self.optimizer.zero_grad()
            (self.model(x).square().mean() * (float("nan") if step == 2 else 1)).backward()
            _, finite = clip_and_check(self.model.parameters(), 1.0)
            gated_step(self.optimizer, finite)
            self.ema.update(self.model, finite)
            self.guard.update(finite)

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {f"student.{name}": value for name, value in self.model.state_dict().items()}
        found |= {f"ema.{name}": value for name, value in self.ema.shadow.items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{number}.{key}": value for key, value in state.items()}
        return found | {"updates": self.ema.updates, "total": self.guard.total}


def assert_same(one: Run, other: Run) -> None:
    a, b = one.tensors(), other.tensors()
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different


def saved_run(folder: Path, *steps: int) -> Run:
    run, done = Run(), 0
    for step in steps:
        run.train(done, step)
        checkpoint.save(folder, step, run.state, config={"seed": 0}, keep_last=len(steps))
        done = step
    return run


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("optimizer", ["adamw", "came"])
def test_a_resumed_run_continues_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    straight = Run(optimizer)
    straight.train(0, 4)
    path = checkpoint.save(tmp_path, 4, straight.state, config={"lr": 1e-2})
    resumed = Run(optimizer, seed=1)
    manifest = checkpoint.load(tmp_path, resumed.state)
    assert_same(straight, resumed)
    straight.train(4, 7)
    resumed.train(4, 7)
    assert_same(straight, resumed)
    assert path == tmp_path / "checkpoints" / "step-00000004"
    assert (manifest["step"], manifest["config"]) == (4, {"lr": 1e-2})
    assert manifest["versions"]["torch"] == torch.__version__
    assert int(resumed.guard.total) == 1
    assert int(resumed.model.get_buffer("calls")) == 7


def test_a_part_can_be_loaded_alone(tmp_path: Path) -> None:
    run, other = saved_run(tmp_path, 3), Run(seed=1)
    before = other.model.get_parameter("0.weight").detach().clone()
    checkpoint.load(tmp_path / "checkpoints" / "step-00000003", {"ema": other.ema})
    assert all(torch.equal(run.ema.shadow[name], other.ema.shadow[name]) for name in run.ema.shadow)
    assert torch.equal(other.model.get_parameter("0.weight"), before)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["manifest.json", ".metadata", "__0_0.distcp"])
def test_damage_is_named_and_the_one_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, name: str
) -> None:
    saved_run(tmp_path, 1, 2)
    newest = tmp_path / "checkpoints" / "step-00000002"
    damage(newest / name)
    with pytest.raises(UserError) as caught:
        checkpoint.load(newest, Run().state)
    assert name in str(caught.value)
    assert str(newest) in str(caught.value)
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING, "tbcm"):
        assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-00000001"
    assert name in caplog.text
    assert checkpoint.load(tmp_path, Run().state)["step"] == 1


def test_nothing_to_load(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load(tmp_path, Run().state)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.load(tmp_path, Run().state)
    saved_run(tmp_path, 1)
    truncate(tmp_path / "checkpoints" / "step-00000001" / "__0_0.distcp")
    with pytest.raises(UserError, match="all 1 checkpoints"):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize("other", [Run(width=4), Run(optimizer="came")])
def test_another_model_or_optimizer_is_refused_in_one_line(tmp_path: Path, other: Run) -> None:
    saved_run(tmp_path, 1)
    with pytest.raises(UserError, match="does not fit") as caught:
        checkpoint.load(tmp_path, other.state)
    assert "\n" not in str(caught.value)


def full_disk_while_opening(self: FileSystem, path: Path, mode: str) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def full_disk_while_writing(self: FileSystem, path: Path, mode: str) -> Iterator[IO[bytes]]:
    with Path("/dev/full").open(mode, buffering=0) as stream:  # torch.save hides the OSError of this one
        yield stream


@pytest.mark.parametrize("create_stream", [full_disk_while_opening, full_disk_while_writing])
def test_a_full_disk_leaves_earlier_checkpoints_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, create_stream: Any
) -> None:
    run = saved_run(tmp_path, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, "create_stream", create_stream)
        with pytest.raises(UserError, match="free some space") as caught:
            checkpoint.save(tmp_path, 3, run.state, config={}, keep_last=1)
    assert "step-00000003" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    resumed = Run(seed=1)
    assert checkpoint.load(tmp_path, resumed.state)["step"] == 2
    assert_same(run, resumed)


def test_keep_last_and_keep_every(tmp_path: Path) -> None:
    state = {"x": {"weights": torch.zeros(2)}}
    for step in range(1, 11):
        checkpoint.save(tmp_path, step, state, config={}, keep_last=2, keep_every=4)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (4, 8, 9, 10)]


def test_the_leftovers_of_a_killed_process_are_ignored_and_removed(tmp_path: Path) -> None:
    run = saved_run(tmp_path, 1)
    complete = tmp_path / "checkpoints" / "step-00000001"
    shutil.copytree(complete, tmp_path / "checkpoints" / ".tmp-0a1b2c3d-step-00000009")
    assert checkpoint.latest(tmp_path) == complete
    checkpoint.save(tmp_path, 2, run.state, config={})
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_run_resumed_from_before_does_not_go_back_to_what_it_left(tmp_path: Path) -> None:
    run = saved_run(tmp_path, 1, 2, 3)
    checkpoint.load(tmp_path / "checkpoints" / "step-00000001", run.state)
    checkpoint.save(tmp_path, 2, run.state, config={"branch": "new"}, keep_last=2)
    assert names(tmp_path) == ["stale-step-00000003", "step-00000001", "step-00000002"]
    assert checkpoint.load(tmp_path, Run().state)["config"] == {"branch": "new"}
