"""Training steps of other families with torch.compile, whose graph holds torch.func.jvp and its modes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families.test_training import written
from torch import Tensor

from tbcm.config import load_config
from tbcm.setup.parts import build_parts
from tbcm.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of torch.compile but the making of code, which takes a minute."""
    compile_ = torch.compile

    def compiled(fn: Any, **options: Any) -> Any:
        return compile_(fn, **options | {"backend": "aot_eager", "options": None})

    monkeypatch.setattr(torch, "compile", compiled)


def gradients(folder: Path, *overrides: str) -> tuple[Tensor, Tensor]:
    """Of one step: the loss and all gradients."""
    config = load_config(folder / "c.yaml", overrides)
    trainer = Trainer(config, CPU, build_parts(config, CPU))
    loss = trainer.gradients()
    assert loss is not None
    return loss, torch.cat([p.grad.flatten() for p in trainer.parameters if p.grad is not None])


@pytest.mark.usefixtures("fresh_compiler", "backend")
@pytest.mark.parametrize("name", ["flux"])
def test_a_compiled_step_is_the_eager_one(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(name, tmp_path)
    eager = gradients(tmp_path, "student.compile=false", "teacher.compile=false")
    compiled = gradients(tmp_path, "student.compile=true", "teacher.compile=false")
    assert "cannot be compiled" not in caplog.text
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for ours, right in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("fresh_compiler", "backend")
def test_a_network_that_asks_for_values_runs_eagerly_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """CogView4 looks at how long its prompts are."""
    written("cogview4", tmp_path)
    eager = gradients(tmp_path, "student.compile=false")
    compiled = gradients(tmp_path, "student.compile=true")
    assert caplog.text.count("this network cannot be compiled and runs eagerly") == 1
    for ours, right in zip(compiled, eager, strict=True):
        assert torch.equal(ours, right)
