from __future__ import annotations

import argparse
import itertools

import pytest
import torch
from torch import Tensor, nn

from tbcm.emoji.training import (
    Budget,
    WeightAverage,
    add_training_arguments,
    budget_of,
    fit,
    learning_rate,
    shuffled_batches,
)
from tbcm.errors import UserError


def test_budget_of_steps_and_of_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [Budget(steps=4).progress(step) for step in (0, 1, 4)] == [0, 0.25, 1]
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    budget = Budget(minutes=2)
    now = 1060.0
    assert budget.progress(10**6) == pytest.approx(0.5)
    budget.start()
    assert budget.progress(10**6) == 0


@pytest.mark.parametrize("wrong", [{}, {"minutes": 1, "steps": 1}, {"minutes": 0}, {"steps": -1}])
def test_a_budget_that_makes_no_sense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="--minutes"):
        Budget(**wrong)


def test_arguments_give_the_default_only_where_nothing_is_said() -> None:
    parser = argparse.ArgumentParser()
    add_training_arguments(parser, minutes=25)
    budgets = [budget_of(parser.parse_args(words)) for words in ([], ["--minutes", "3"], ["--steps", "7"])]
    assert [(budget.minutes, budget.steps) for budget in budgets] == [(25, None), (3, None), (None, 7)]


def test_learning_rate_warms_up_and_decays() -> None:
    assert learning_rate(1.0, 0, 0.0, 100) == pytest.approx(0.01)
    assert learning_rate(1.0, 99, 0.0, 100) == pytest.approx(1.0)
    assert learning_rate(1.0, 500, 0.5, 100) == pytest.approx(0.505)
    assert learning_rate(1.0, 500, 1.3, 100) == pytest.approx(0.01)


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


def test_batches_are_epochs_without_repeats() -> None:
    batches = list(itertools.islice(shuffled_batches(10, 4, torch.Generator().manual_seed(0)), 4))
    for epoch in (batches[:2], batches[2:]):
        seen = torch.cat(epoch).tolist()
        assert len(seen) == len(set(seen)) == 8 and max(seen) < 10
    assert next(shuffled_batches(3, 4, torch.Generator())).sort().values.tolist() == [0, 1, 2]


def test_fit_minimises_and_saves_at_the_end() -> None:
    model, average = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    target, saves = 0.25, []

    def loss(step: int) -> Tensor:
        return (model.weight - target).square().mean()

    fit(
        WeightAverage(model, average, 0.9),
        loss,
        saves.append,
        Budget(steps=300),
        peak_lr=0.05,
        weight_decay=0,
        warmup=10,
    )
    assert saves == [300]
    assert average.weight.item() == pytest.approx(target, abs=1e-2)


def test_fit_saves_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tbcm.emoji.training.SAVE_MINUTES", 0.0)
    model, saves = nn.Linear(1, 1), []
    average = WeightAverage(model, nn.Linear(1, 1), 0.9)
    fit(average, lambda step: model.weight.square().mean(), saves.append, Budget(steps=2), peak_lr=0.1, weight_decay=0)
    assert saves == [1, 2, 2]
