from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from torch import multiprocessing, nn
from torch.distributed.checkpoint.filesystem import FileSystem

from tbcm.errors import UserError
from tbcm.runtime import checkpoint
from tbcm.runtime.checkpoint_writer import CheckpointWriter, HostCopy
from tbcm.runtime.ema import EMA
from tbcm.runtime.guard import NonFiniteGuard
from tbcm.runtime.leftovers import temporary
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
    assert (manifest["ranks"], manifest["sharded"]) == (1, False)
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


def test_an_optimizer_that_kept_other_state_is_refused_in_one_line(tmp_path: Path) -> None:
    """CAME factored all convolutions once, so such a checkpoint has no full second moment of them."""
    weight = torch.nn.Parameter(torch.zeros(6, 1, 3, 3))
    optimizer = build_optimizer("came", [weight], lr=1e-2)
    now = optimizer.state[weight]
    then = {"row": torch.zeros(6), "col": torch.zeros(9)}
    optimizer.state[weight] = {"momentum": now["momentum"], **then, **{f"instability_{k}": v for k, v in then.items()}}
    checkpoint.save(tmp_path, 1, {"optimizer": optimizer}, config={})
    optimizer.state[weight] = now
    with pytest.raises(UserError, match=r"Missing key.*square.*go on with that version of tbcm") as caught:
        checkpoint.load(tmp_path, {"optimizer": optimizer})
    assert "\n" not in str(caught.value)


def full_disk_while_opening(self: FileSystem, path: Path, mode: str) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def full_disk_while_writing(self: FileSystem, path: Path, mode: str) -> Iterator[IO[bytes]]:
    with Path("/dev/full").open(mode, buffering=0) as stream:  # torch.save hides the OSError of this one
        yield stream


def save_and_wait(writer: CheckpointWriter, step: int, state: dict[str, Any]) -> None:
    writer.save(step, state, {})
    writer.wait()


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("create_stream", [full_disk_while_opening, full_disk_while_writing])
def test_a_full_disk_leaves_earlier_checkpoints_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, create_stream: Any, asynchronous: bool
) -> None:
    run = saved_run(tmp_path, 1, 2)
    writer = CheckpointWriter(tmp_path, keep_last=1, asynchronous=asynchronous)
    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, "create_stream", create_stream)
        with pytest.raises(UserError, match="free some space") as caught:
            save_and_wait(writer, 3, run.state)
    assert "step-00000003" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert writer.saved is None
    resumed = Run(seed=1)
    assert checkpoint.load(tmp_path, resumed.state)["step"] == 2
    assert_same(run, resumed)
    save_and_wait(writer, 3, run.state)  # now that there is space
    assert writer.saved == (3, tmp_path / "checkpoints" / "step-00000003")
    assert names(tmp_path) == ["step-00000003"]


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch, failure: OSError | None = None) -> Iterator[None]:
    """The writing that begins in the block stops at its first file until the end of the block, and fails there or goes
    on."""
    open_file, begun, release = FileSystem.create_stream, threading.Event(), threading.Event()

    def wait(self: FileSystem, path: Path, mode: str) -> Any:
        begun.set()
        assert release.wait(60)
        if failure:
            raise failure
        return open_file(self, path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, "create_stream", wait)
        yield
        assert begun.wait(60)
    release.set()


def test_training_goes_on_while_its_state_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, then = Run(), Run()
    run.train(0, 3)
    then.train(0, 3)
    writer = CheckpointWriter(tmp_path)
    for step in (3, 5):  # the second time in the buffers of the first
        with held(monkeypatch):
            writer.save(step, run.state, {})
            assert not (tmp_path / "checkpoints" / f"step-{step:08d}").exists()
            run.train(step, step + 2)
        writer.wait()
        resumed = Run(seed=1)
        assert checkpoint.load(tmp_path, resumed.state)["step"] == step
        assert_same(then, resumed)
        then.train(step, step + 2)


def test_one_save_is_in_flight_and_its_error_is_raised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, writer = saved_run(tmp_path, 1), CheckpointWriter(tmp_path)
    with held(monkeypatch):
        writer.save(2, run.state, {})
        assert writer.saved is None
    writer.save(3, run.state, {})
    assert writer.saved == (2, tmp_path / "checkpoints" / "step-00000002")
    writer.wait()
    with held(monkeypatch, OSError(errno.ENOSPC, "No space left on device")):
        writer.save(4, run.state, {})
    with pytest.raises(UserError, match=r"cannot write .*step-00000004: the disk is full"):
        writer.save(5, run.state, {})
    assert writer.saved == (3, tmp_path / "checkpoints" / "step-00000003")
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    save_and_wait(writer, 6, run.state)
    assert names(tmp_path) == ["step-00000003", "step-00000006"]


def test_a_run_that_fails_lets_its_save_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, writer = Run(), CheckpointWriter(tmp_path)
    writer.save(1, run.state, {})
    writer.close()
    assert names(tmp_path) == ["step-00000001"]
    with held(monkeypatch, OSError(errno.ENOSPC, "No space left on device")):
        writer.save(2, run.state, {})
    writer.close()
    assert "step-00000002 was not saved" in caplog.text
    writer.wait()  # nothing is left to wait for


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
def test_a_copy_keeps_bits_structure_and_buffers(device: str) -> None:
    whole = torch.arange(12.0, device=device).reshape(3, 4)
    images = torch.randn(2, 3, 4, 4, device=device).to(memory_format=torch.channels_last)
    state = {"view": whole[1:, ::2], "images": images, "rest": OrderedDict(none=None, pair=(1, 0.5), rows=[whole, "x"])}
    copy = HostCopy()
    first = copy(state)
    assert first["view"].device.type == "cpu"
    assert first["view"].is_pinned() == (device == "cuda")
    assert torch.equal(first["view"], torch.tensor([[4.0, 6.0], [8.0, 10.0]]))
    assert torch.equal(first["images"], images.cpu())
    assert (first["rest"]["none"], first["rest"]["pair"], first["rest"]["rows"][1]) == (None, (1, 0.5), "x")
    whole.neg_()
    assert first["view"][0, 0] == first["rest"]["rows"][0][1, 0] == 4
    second = copy(state)
    assert second["view"][0, 0] == second["rest"]["rows"][0][1, 0] == -4
    assert second["images"].data_ptr() == first["images"].data_ptr() != images.data_ptr()
    state["view"] = torch.ones(3, dtype=torch.float64)  # a buffer that no longer fits is replaced
    assert copy(state)["view"].equal(torch.ones(3, dtype=torch.float64))


def state_at(step: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(step)
    return {"some": {f"weight{i}": torch.randn(100, 100, generator=draw) for i in range(10)}, "steps": {"done": step}}


def save_until_killed(folder: Path, done: int) -> None:
    writer, state = CheckpointWriter(folder, keep_last=1 + done % 2), state_at(done)
    for step in range(done + 1, done + 1000):
        for name, value in state_at(step)["some"].items():  # in place, as an optimiser does
            state["some"][name].copy_(value)
        state["steps"]["done"] = step
        writer.save(step, state, {})
    os._exit(1)


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*"))


def kill_ten_times(folder: Path) -> None:
    torch.set_num_threads(1)
    draw, step = random.Random(0), 0
    for _ in range(10):
        child = os.fork()  # faster than a new process, and safe: no other thread runs here
        if child == 0:
            save_until_killed(folder, step)
        while max(steps_in(folder), default=0) <= step:  # it has begun
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for step in steps_in(folder):
            loaded = {"some": {f"weight{i}": torch.zeros(100, 100) for i in range(10)}, "steps": {"done": 0}}
            assert checkpoint.load(folder / "checkpoints" / f"step-{step:08d}", loaded)["step"] == step
            expected = state_at(step)
            assert loaded["steps"] == expected["steps"]
            assert all(torch.equal(loaded["some"][name], value) for name, value in expected["some"].items())


def raise_during_a_save(folder: Path) -> None:
    opened = FileSystem.create_stream

    def slowly(self: FileSystem, path: Path, mode: str) -> Any:
        time.sleep(0.5)
        return opened(self, path, mode)

    FileSystem.create_stream = slowly  # type: ignore[method-assign]
    CheckpointWriter(folder).save(7, state_at(7), {})
    raise SystemExit(3)


def exit_code(function: Any, *arguments: Any) -> int | None:
    """Of a new process that runs `function`."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join(100)
    process.kill()
    return process.exitcode


def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path: Path) -> None:
    assert exit_code(kill_ten_times, tmp_path) == 0


def test_a_process_that_raises_ends_its_save(tmp_path: Path) -> None:
    assert exit_code(raise_during_a_save, tmp_path) == 3
    assert names(tmp_path) == ["step-00000007"]
    assert checkpoint.latest(tmp_path) is not None


def test_keep_last_and_keep_every(tmp_path: Path) -> None:
    state = {"x": {"weights": torch.zeros(2)}}
    for step in range(1, 11):
        checkpoint.save(tmp_path, step, state, config={}, keep_last=2, keep_every=4)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (4, 8, 9, 10)]


def moved_away(path: Path, to: Path) -> Path:
    """Moves a checkpoint to another disk and leaves a link behind, as people do whose disk is full."""
    shutil.move(path, to)
    path.symlink_to(to)
    return to


@pytest.mark.parametrize("fate", ["there", "gone"])
def test_a_checkpoint_that_was_moved_and_linked_is_unlinked_when_its_time_comes(tmp_path: Path, fate: str) -> None:
    run, folder = saved_run(tmp_path / "run", 1, 2), tmp_path / "run" / "checkpoints"
    away = moved_away(folder / "step-00000001", tmp_path / "big-disk")
    if fate == "gone":
        shutil.rmtree(away)
    for step in (3, 4):
        checkpoint.save(tmp_path / "run", step, run.state, config={}, keep_last=2)
    assert names(tmp_path / "run") == ["step-00000003", "step-00000004"]
    assert fate == "gone" or checkpoint.load(away, Run().state)["step"] == 1


def test_a_linked_later_checkpoint_becomes_stale_and_stays(tmp_path: Path) -> None:
    run, folder = saved_run(tmp_path / "run", 1, 3), tmp_path / "run" / "checkpoints"
    away = moved_away(folder / "step-00000003", tmp_path / "big-disk")
    (folder / "stale-step-00000003").symlink_to(tmp_path)
    checkpoint.save(tmp_path / "run", 2, run.state, config={})
    assert names(tmp_path / "run") == ["stale-step-00000003", "step-00000001", "step-00000002"]
    assert (folder / "stale-step-00000003").readlink() == away and checkpoint.load(away, Run().state)["step"] == 3


@pytest.mark.parametrize("linked", ["run", "run/checkpoints"])
def test_the_folders_themselves_may_be_links(tmp_path: Path, linked: str) -> None:
    (tmp_path / "big-disk").mkdir()
    (tmp_path / linked).parent.mkdir(exist_ok=True)
    (tmp_path / linked).symlink_to(tmp_path / "big-disk")
    saved = saved_run(tmp_path / "run", 1, 2)
    checkpoint.save(tmp_path / "run", 3, saved.state, config={}, keep_last=2)
    assert names(tmp_path / "run") == ["step-00000002", "step-00000003"]
    assert (tmp_path / linked).is_symlink() and checkpoint.load(tmp_path / "run", Run().state)["step"] == 3


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EACCES, errno.ENOTEMPTY, errno.EIO])
def test_pruning_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    run = saved_run(tmp_path, 1)

    def failing(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", failing)
        for step in (2, 3, 4):
            checkpoint.save(tmp_path, step, run.state, config={}, keep_last=1)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-00000004"
    assert caplog.text.count(os.strerror(number)) == 3  # one for each of those that were to go
    checkpoint.save(tmp_path, 5, run.state, config={}, keep_last=1)  # now they go
    assert names(tmp_path) == ["step-00000005"]


def test_a_checkpoint_that_cannot_be_renamed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that is a mount point."""
    run, real = saved_run(tmp_path, 1), Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "step-00000001":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    for step in (2, 3):
        checkpoint.save(tmp_path, step, run.state, config={}, keep_last=1)
    assert names(tmp_path) == ["step-00000001", "step-00000003"] and caplog.text.count("busy") == 1


def test_what_is_no_checkpoint_of_ours_is_not_pruned(tmp_path: Path) -> None:
    run, folder = saved_run(tmp_path, 1), tmp_path / "checkpoints"
    for name in ("step-1", "step-001", "step-00000001-best", "step-000000001"):
        shutil.copytree(folder / "step-00000001", folder / name)
    (folder / "step-00000000").write_text("notes")
    checkpoint.save(tmp_path, 2, run.state, config={}, keep_last=1)
    kept = ["step-00000000", "step-00000001-best", "step-000000001", "step-00000002", "step-001", "step-1"]
    assert names(tmp_path) == sorted(kept) and checkpoint.load(tmp_path, Run().state)["step"] == 2


def test_the_leftovers_of_a_killed_process_are_ignored_and_removed(tmp_path: Path) -> None:
    run = saved_run(tmp_path, 1)
    complete = tmp_path / "checkpoints" / "step-00000001"
    shutil.copytree(complete, temporary(complete))
    assert checkpoint.latest(tmp_path) == complete
    checkpoint.save(tmp_path, 2, run.state, config={})
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_run_resumed_from_before_does_not_go_back_to_what_it_left(tmp_path: Path) -> None:
    run = saved_run(tmp_path, 1, 2, 3)
    checkpoint.load(tmp_path / "checkpoints" / "step-00000001", run.state)
    checkpoint.save(tmp_path, 2, run.state, config={"branch": "new"}, keep_last=2)
    assert names(tmp_path) == ["stale-step-00000003", "step-00000001", "step-00000002"]
    assert checkpoint.load(tmp_path, Run().state)["config"] == {"branch": "new"}
