"""Sampling computes in the configured precision, whatever precision the weights are kept in."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_sana
from tiny import PROMPTS, HashEncoder, tiny_config, write_config, write_teacher
from torch import Tensor, nn

from tbcm import train
from tbcm.config import load_config
from tbcm.inference.exporting import export
from tbcm.inference.generation import Sampler
from tbcm.inference.student import load_student, open_origin
from tbcm.models.loading import freeze
from tbcm.models.pipeline import Pipeline
from tbcm.models.sana.network import SanaTrigFlow
from tbcm.samples.rollouts import TextConditions

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose student computes in bf16."""
    home = tmp_path_factory.mktemp("home")
    (home / "prompts.txt").write_text("a red ball\na blue ball\n")
    config = write_config(
        home / "c.yaml",
        write_teacher(home / "teacher"),
        home / "prompts.txt",
        home / "run",
        train={"steps": 1, "prompts_per_step": 2},
        student={"precision": "bf16"},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tbcm", str(config)])
        assert train.main() == 0
    return home / "run"


def sampler(run: Path, weights: torch.dtype, precision: str) -> tuple[Sampler, set[tuple[torch.dtype, bool]]]:
    """A sampler, and what its network then computes in: the precision, and whether weights are cast to it."""
    net = SanaTrigFlow(tiny_sana(guidance_embeds=True), timestep_scale=1.0, differentiable=False).to(weights)
    freeze(net)
    seen: set[tuple[torch.dtype, bool]] = set()

    def note(layer: nn.Module, given: Any, out: Tensor) -> None:
        seen.add((out.dtype, torch.is_autocast_enabled("cpu")))

    net.backbone.caption_projection.linear_1.register_forward_hook(note)
    config, pipeline = tiny_config(run, student={"precision": precision}), Pipeline(str(run.parent / "teacher"))
    return Sampler(net, TextConditions(HashEncoder(), "own"), config, pipeline, teacher=False), seen


@pytest.mark.parametrize(
    ("weights", "precision", "computes"),
    [
        (torch.float32, "fp32", (torch.float32, False)),
        (torch.float32, "bf16", (torch.bfloat16, True)),
        (torch.bfloat16, "bf16", (torch.bfloat16, False)),
        (torch.float32, "fp16", (torch.float16, True)),
    ],
)
def test_a_student_computes_in_its_precision(
    run: Path, weights: torch.dtype, precision: str, computes: tuple[torch.dtype, bool]
) -> None:
    this, seen = sampler(run, weights, precision)
    latents = this.latents(PROMPTS[:2], steps=2)
    assert seen == {computes} and latents.dtype == torch.float32
    exact = sampler(run, torch.float32, "fp32")[0].latents(PROMPTS[:2], steps=2)
    torch.testing.assert_close(latents, exact, rtol=0, atol=0.1)
    assert torch.equal(latents, exact) == (precision == "fp32")


@pytest.mark.parametrize(("precision", "kept"), [("bf16", torch.bfloat16), ("fp16", torch.float32)])
def test_a_runs_student_is_kept_as_it_computes(run: Path, precision: str, kept: torch.dtype) -> None:
    """Nothing is cast on every call, but fp16, which has too little range for whole networks in it."""
    source = replace(open_origin(str(run)), config=load_config(run / "config.yaml", [f"student.precision={precision}"]))
    assert {weight.dtype for weight in load_student(source, CPU).parameters()} == {kept}


def test_an_export_is_of_the_exact_weights(run: Path, tmp_path: Path) -> None:
    export(str(run), tmp_path / "out", dtype=torch.float32)
    written = load_student(open_origin(str(tmp_path / "out")), CPU, torch.float32).state_dict()
    exact = load_student(open_origin(str(run)), CPU, torch.float32)
    assert any((weight != weight.bfloat16()).any() for weight in exact.parameters())
    for name, value in written.items():
        assert torch.equal(value, exact.state_dict()[name]), name
