from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tbcm.errors import UserError
from tbcm.icons import training as module
from tbcm.icons.training import Budget, Rate, Training, WeightAverage, add_training_arguments, budget_of


def make(checkpoint: Path, rate: Rate | None = None) -> tuple[Training, Callable[[], Tensor]]:
    """A model of one weight, and a noisy loss whose minimum is at 0.25."""
    torch.manual_seed(0)
    model, average = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    generator = torch.Generator().manual_seed(0)
    training = Training(WeightAverage(model, average, 0.9), rate or Rate(0.05, 10), 0.0, generator, checkpoint)

    def loss() -> Tensor:
        return (model.weight - 0.25 + 0.1 * torch.randn(1, 1, generator=generator)).square().mean()

    return training, loss


def weights(training: Training) -> list[float]:
    return [module.weight.item() for module in (training.average.source, training.average.average)]  # type: ignore[union-attr]


@pytest.mark.parametrize("wrong", [{"minutes": 0}, {"steps": -1}, {"cooldown": -1}])
def test_a_budget_that_makes_no_sense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="--minutes"):
        Budget(**wrong)


def test_when_a_budget_is_spent() -> None:
    assert not Budget().spent(10**9, 1e9)
    assert [Budget(steps=4).spent(step, 0) for step in (3, 4)] == [False, True]
    assert [Budget(minutes=4).spent(0, minutes) for minutes in (3.9, 4)] == [False, True]


def test_arguments() -> None:
    parser = argparse.ArgumentParser()
    add_training_arguments(parser)
    assert budget_of(parser.parse_args([])) == Budget()
    words = ["--steps", "7", "--minutes", "3", "--cooldown-steps", "2"]
    assert budget_of(parser.parse_args(words)) == Budget(7, 3, 2)


def test_rate_warms_up_stays_and_cools_down() -> None:
    rate = Rate(2.0, warmup=4)
    assert [rate(step) for step in (0, 1, 3, 10**6)] == [0.5, 1.0, 2.0, 2.0]
    assert [rate(step, (100, 10)) for step in (100, 105, 110)] == [2.0, 1.0, 0.0]


def test_weight_average_is_the_recursion() -> None:
    source, average = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    mean = WeightAverage(source, average, decay=0.3)
    expected = source.weight.item()
    assert average.weight.item() == expected and not average.weight.requires_grad
    for n, value in enumerate([1.0, -2.0, 5.0, 3.0], start=1):
        with torch.no_grad():
            source.weight.fill_(value)
        mean.update()
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
        assert average.weight.item() == pytest.approx(expected, rel=1e-6)


def test_fit_minimises_and_exports_at_the_end(tmp_path: Path) -> None:
    training, loss = make(tmp_path / "a.ckpt")
    exports: list[int] = []
    training.fit(loss, exports.append, Budget(steps=400, cooldown=200))
    assert exports == [600] and training.step == 600
    assert weights(training) == pytest.approx([0.25, 0.25], abs=0.02)


def test_an_interrupted_training_ends_where_a_whole_one_ends(tmp_path: Path) -> None:
    budget = Budget(steps=20, cooldown=10)
    whole, loss = make(tmp_path / "whole.ckpt")
    whole.fit(loss, lambda step: None, budget)
    for stop in (7, 13, 25, 30):  # before, and in the middle of, the cooldown
        part, loss = make(tmp_path / "part.ckpt")

        def interrupted(part: Training = part, loss: Callable[[], Tensor] = loss, stop: int = stop) -> Tensor:
            if part.step == stop:
                part.save()  # what happens every few minutes
                raise KeyboardInterrupt
            return loss()

        try:
            part.fit(interrupted, lambda step: None, budget)
        except KeyboardInterrupt:
            continue
    assert part.step == whole.step == 30
    assert weights(part) == weights(whole)
    assert part.optimizer.state_dict()["state"][0]["exp_avg"] == whole.optimizer.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(part.generator.get_state(), whole.generator.get_state())


def test_a_spent_budget_trains_no_further(tmp_path: Path) -> None:
    training, loss = make(tmp_path / "a.ckpt")
    training.fit(loss, lambda step: None, Budget(steps=5))
    again, loss = make(tmp_path / "a.ckpt")
    again.fit(loss, lambda step: None, Budget(steps=5))
    assert again.step == 5 and weights(again) == weights(training)
    for _ in range(2):  # nor does one that has cooled down cool down again
        cooled, loss = make(tmp_path / "a.ckpt")
        cooled.fit(loss, lambda step: None, Budget(steps=8, cooldown=4))
        assert cooled.step == 12


def test_checkpoint_and_export_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(0, 60)
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))
    training, loss = make(tmp_path / "a.ckpt")
    saved: list[int] = []
    monkeypatch.setattr(Training, "save", lambda self: saved.append(self.step))
    exports: list[int] = []
    monkeypatch.setattr(module, "EXPORT_MINUTES", 5 * module.SAVE_MINUTES)
    training.fit(loss, exports.append, Budget(steps=40))
    assert len(saved) > len(exports) > 1 and saved[-1] == exports[-1] == 40


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_a_broken_checkpoint_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.ckpt is no checkpoint of this training.*move it away"):
        make(tmp_path / "a.ckpt")
    torch.save({"model": {"other": torch.zeros(1)}}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"a\.ckpt is no checkpoint of this training"):
        make(tmp_path / "a.ckpt")
