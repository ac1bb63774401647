from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_parts

from tbcm.samples.overlap import Overlapped
from tbcm.samples.rollouts import Batch
from tbcm.training.trainer import Trainer

CPU = torch.device("cpu")


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.trajectory.x, y.trajectory.x)
        and torch.equal(x.condition.tensors["embeds"], y.condition.tensors["embeds"])
        for x, y in zip(a, b, strict=True)
    )


def test_batches_are_those_of_the_source_in_any_order_of_steps(tmp_path: Path) -> None:
    trainer = Trainer(config := tiny_config(tmp_path, train={"prompts_per_rollout": 2}), CPU, tiny_parts(config))
    ahead = Overlapped(trainer.source, CPU)
    assert (ahead.batches, ahead.samples_per_prompt) == (2, 3)
    for step in (0, 1, 2, 7, 3):  # 7 and 3: as after a resume
        assert same(list(ahead(step)), list(trainer.source(step)))


def test_a_step_given_up_half_way_starts_again(tmp_path: Path) -> None:
    trainer = Trainer(config := tiny_config(tmp_path, train={"prompts_per_rollout": 2}), CPU, tiny_parts(config))
    ahead = Overlapped(trainer.source, CPU)
    next(ahead(4))
    assert same(list(ahead(4)), list(trainer.source(4)))


def test_one_batch_is_made_ahead_and_no_more(tmp_path: Path) -> None:
    trainer = Trainer(config := tiny_config(tmp_path, train={"prompts_per_rollout": 2}), CPU, tiny_parts(config))
    source, made = trainer.source, []
    original = source._batch

    def counted(prompts: list[str], *rest: object) -> Batch:
        made.append(len(prompts))
        return original(prompts, *rest)

    source._batch = counted
    ahead = Overlapped(source, CPU)
    for taken, _ in enumerate(ahead(0), start=1):
        assert len(made) == taken + 1
    list(ahead(1))
    assert len(made) == 5


def test_a_run_with_overlap_is_the_same_run(tmp_path: Path) -> None:
    students = []
    for overlap in (False, True):
        config = tiny_config(tmp_path / str(overlap), train={"steps": 3, "overlap_rollout": overlap})
        trainer = Trainer(config, CPU, tiny_parts(config))
        trainer.run()
        students.append([p.detach() for p in trainer.student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*students, strict=True))


class _Streams:
    """In the place of CUDA's: who waits for whom, and on which stream a batch is made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.inside = "main"
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: _Stream("side", self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: _Stream(self.inside, self))
        monkeypatch.setattr(torch.cuda, "stream", self._entered)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)

    @contextmanager
    def _entered(self, stream: _Stream) -> Iterator[None]:
        before, self.inside = self.inside, stream.name
        yield
        self.inside = before


class _Stream:
    def __init__(self, name: str, streams: _Streams) -> None:
        self.name, self.device, self._streams = name, torch.device("cuda"), streams

    def wait_stream(self, other: _Stream) -> None:
        self._streams.events.append(f"{self.name} waits for {other.name}")


def test_the_side_stream_waits_once_for_what_was_made_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and the null prompt's keys and values are made on another stream than the rollouts that read them."""
    trainer = Trainer(config := tiny_config(tmp_path), CPU, tiny_parts(config))
    streams, original = _Streams(monkeypatch), trainer.source._batch

    def noted(*arguments: Any) -> Batch:
        streams.events.append(f"made on {streams.inside}")
        return original(*arguments)

    trainer.source._batch = noted
    ahead = Overlapped(trainer.source, torch.device("cuda"))
    list(ahead(0))
    list(ahead(1))
    first, handed_out = ["side waits for main", "made on side"], ["main waits for side", "made on side"]
    assert streams.events == first + handed_out * 2
