"""The checks of a GPU: run here over Triton's interpreter, and shown to see what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import checks
import pytest
import torch
from speed import checks as known
from speed.checks import Setting
from tbcm_kernels.registry import OPERATORS
from torch import Tensor

from tbcm.config import Config
from tbcm.errors import UserError
from tbcm.setup.parts import Parts
from tbcm.training.random_parts import random_parts

HERE = Setting(torch.device("cpu"), "tiny", ["fp32"])


def test_a_kernel_is_held_against_fp64_and_a_wrong_one_is_seen(
    kernels: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "norm_modulate"
    right = OPERATORS[name]

    def wrong(*arguments: Any) -> Any:
        value = right.run(*arguments)
        return tuple(x if x is None else x * 1.001 for x in value) if isinstance(value, tuple) else value * 1.001

    for operator, passes in ((right, True), (replace(right, run=wrong), False)):
        monkeypatch.setattr(known, "OPERATORS", {name: operator})
        rows = list(known.operators(HERE))
        assert {row["case"] for row in rows} == {
            f"{name} fp32 {kind}" for kind in ("value", "value and tangent", "gradients")
        }
        assert all(row["passed"] is passes for row in rows), rows


def test_a_step_is_held_against_the_cpus_and_one_that_differs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(known.methods(HERE))
    assert len(rows) == 6 and all(row["passed"] for row in rows)
    monkeypatch.setattr(known, "random_parts", partial(parts_of_another_gain, count=iter(range(9))))
    assert not any(row["passed"] for row in known.methods(HERE) if "gradients" in row["case"])


def parts_of_another_gain(config: Config, device: torch.device, count: Iterator[int]) -> Parts:
    """Every second student answers 2 % more."""
    parts = random_parts(config, device)
    if next(count) % 2:
        parts.student.backbone.proj_out.register_forward_hook(lambda module, given, out: out * 1.02)
    return parts


def test_not_a_number_does_not_pass() -> None:
    assert known.row("x", float("nan"), 1.0)["passed"] is False
    assert known.distance(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])) == 0
    assert known.distance(torch.tensor([1.1]), torch.tensor([1.0])) == pytest.approx(0.1, rel=1e-5)


def test_what_breaks_and_what_cannot_be_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(setting: Setting) -> Any:
        yield known.row("first", 0.0, 1.0)
        raise RuntimeError("no such kernel")

    def cannot(setting: Setting) -> Any:
        raise UserError("fp8 needs another GPU")
        yield

    monkeypatch.setattr(checks, "CHECKS", {"breaks": breaks, "cannot": cannot})
    rows = checks.run(["breaks", "cannot"], HERE, tmp_path)
    assert [row["passed"] for row in rows] == [True, False, None]
    assert rows[1]["note"] == "RuntimeError: no such kernel"
    assert len((tmp_path / "checks.jsonl").read_text().splitlines()) == len(rows)
    assert json.loads((tmp_path / "checks.jsonl").read_text().splitlines()[0])["case"] == "first"


def test_batches_move_whole() -> None:
    trainer = known._trainer(HERE, {})
    batch = known.moved(next(iter(trainer.source(0))), torch.device("meta"))

    def devices(value: Any) -> set[str]:
        if isinstance(value, Tensor):
            return {value.device.type}
        parts = (
            value.values() if isinstance(value, dict) else vars(value).values() if hasattr(value, "__dict__") else ()
        )
        return {name for part in parts for name in devices(part)}

    assert devices(batch) == {"meta"}
