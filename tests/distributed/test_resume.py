"""A run that is stopped after any of its steps and resumed is the run that was not: weights, state and metrics."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from end_state import differences
from ranks import on_ranks
from tiny import tiny_config, tiny_parts

from tbcm.training.trainer import Trainer

STEPS = 6
Sections = dict[str, dict[str, Any]]


def make(out: Path, sections: Sections, prompts_per_step: int = 2) -> Trainer:
    config = tiny_config(out, train={"steps": STEPS, "prompts_per_step": prompts_per_step}, **sections)
    return Trainer(config, torch.device("cpu"), tiny_parts(config))


def stop_after(trainer: Trainer, step: int) -> None:
    """A cluster's SIGTERM comes when so many steps are done."""
    train_step = trainer.train_step

    def told(stop: Callable[[], bool]) -> bool:
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(stop)

    trainer.train_step = told  # type: ignore[assignment,method-assign]


@pytest.mark.parametrize(
    "kind",
    [
        {"optimizer": {"name": "adamw"}},
        {"optimizer": {"name": "came"}},
        {"method": {"name": "sprint"}},
        {"method": {"name": "lcm", "target_decay": 0.5}},
        {"method": {"name": "pcm", "phases": 2, "target_decay": 0.5, "adversary": {"lr": 1e-3}}},
        {"method": {"name": "dmd2", "steps": 2, "fake": {"updates": 2, "lr": 1e-3}}},
    ],
    ids=["adamw", "came", "sprint", "lcm", "pcm", "dmd2"],
)
def test_resumed_after_any_step_it_is_the_same_run(tmp_path: Path, kind: Sections) -> None:
    # Rows are means of two steps: those of a run stopped between two must have been kept.
    sections: Sections = {**kind, "log": {"every": 2}}
    make(tmp_path / "whole", sections).run()
    for step in range(STEPS):
        stopped = make(tmp_path / str(step), sections)
        stop_after(stopped, step)
        assert stopped.run() and stopped.step == step
        resumed = make(tmp_path / str(step), sections)
        resumed.resume()
        assert resumed.step == step
        assert not resumed.run()
        assert differences(tmp_path / str(step), tmp_path / "whole") == [], f"stopped after step {step}"


def test_stopped_after_every_step_it_is_the_same_run(tmp_path: Path) -> None:
    sections: Sections = {"log": {"every": 4}}
    make(tmp_path / "whole", sections).run()
    for step in range(STEPS):
        trainer = make(tmp_path / "stopped", sections)
        if step:
            trainer.resume()
        stop_after(trainer, step + 1)
        assert trainer.run() == (step + 1 < STEPS)
    assert differences(tmp_path / "stopped", tmp_path / "whole") == []


def stopped_half_way(out: Path, modes: list[str]) -> None:
    for mode in modes:
        sections: Sections = {"parallel": {"mode": mode}, "log": {"every": 2}}
        make(out / mode / "whole", sections, 3).run()
        stopped = make(out / mode / "stopped", sections, 3)
        stop_after(stopped, STEPS // 2)
        stopped.run()
        resumed = make(out / mode / "stopped", sections, 3)
        resumed.resume()
        resumed.run()


def test_resumed_on_three_ranks_it_is_the_same_run(tmp_path: Path) -> None:
    """Two can add up gradients in one order only; with three it depends on a gradient's place in what is exchanged."""
    on_ranks(3, stopped_half_way, tmp_path, ["ddp", "fsdp"])
    for mode in ("ddp", "fsdp"):
        assert differences(tmp_path / mode / "stopped", tmp_path / mode / "whole") == [], mode
