"""The demo's training: as many steps as fit into its minutes, with a learning rate that has fallen by the last."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import metrics, tiny_config, tiny_parts

from tbcm.icons import demo
from tbcm.training.trainer import Trainer

SECONDS_A_STEP = 2.0


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """Its first steps, which are timed, take two seconds each by the demo's clock, and everything else none."""
    config = tiny_config(
        tmp_path, train={"steps": 60}, optimizer={"lr": 0.1, "warmup_steps": 0, "cooldown_steps": 20}, log={"every": 1}
    )
    trainer = Trainer(config, torch.device("cpu"), tiny_parts(config))
    clock, step = Clock(), trainer.train_step

    def timed_step() -> bool:
        clock.now += SECONDS_A_STEP
        return step()

    monkeypatch.setattr(trainer, "train_step", timed_step)
    monkeypatch.setattr(demo, "time", clock)
    return trainer


@pytest.mark.parametrize(
    ("minutes", "steps", "cooldown"),
    [(1.0, 30, 15), (1.9, 57, 20), (100.0, 60, 20), (0.0, 4, 2)],
    ids=["half", "almost", "more than enough", "none"],
)
def test_as_many_steps_as_fit(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, minutes: float, steps: int, cooldown: int
) -> None:
    demo.fit(trainer, minutes)
    monkeypatch.undo()
    assert trainer.config.train.steps == steps
    assert trainer.config.optimizer.cooldown_steps == cooldown
    assert trainer.learning_rate(steps - 1) == pytest.approx(0.1 / (cooldown + 1))
    assert trainer.learning_rate(steps - 1 - cooldown) == pytest.approx(0.1)


def test_the_run_ends_there(trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo.fit(trainer, 12 * SECONDS_A_STEP / 60)
    monkeypatch.undo()
    assert not trainer.run()
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(5, 13))
    assert rows[-1]["lr"] == pytest.approx(0.1 / 7)
