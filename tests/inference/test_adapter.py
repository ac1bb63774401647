"""The adapter of a teacher that embeds guidance itself, in SanaSprintPipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaSprintPipeline, SCMScheduler
from helpers import tiny_sana
from sana_cases import sprint_latents
from tiny import tiny_config, tiny_vae

from tbcm.config import Config
from tbcm.errors import UserError
from tbcm.inference.adapter import export_adapter
from tbcm.inference.exporting import export
from tbcm.inference.generation import open_sampler
from tbcm.models.pipeline import Pipeline
from tbcm.runtime.seeding import generator
from tbcm.setup.parts import build_parts
from tbcm.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path) -> Config:
    """As if it had been trained for long; saved."""
    torch.manual_seed(0)
    transformer = tiny_sana(caption_channels=384, guidance_embeds=True, timestep_scale=1.0)
    parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "vae": tiny_vae(), "transformer": transformer}
    SanaSprintPipeline(**parts, scheduler=SCMScheduler()).save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a red ball\na blue ball")
    config = tiny_config(
        tmp_path / "run",
        teacher={"path": str(tmp_path / "teacher"), "null_mask": "own"},
        data={"prompts": str(tmp_path / "prompts.txt")},
        student={"lora": {"rank": 2, "alpha": 3.0}},
    )
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml())
    trainer = Trainer(config, CPU, build_parts(config, CPU))
    for name, weight in trainer.student.named_parameters():
        if weight.requires_grad:
            weight.data = 0.2 * torch.randn_like(weight)
            trainer.ema.shadow[name].copy_(weight.data)
    trainer.save()
    trainer.writer.wait()
    return config


def drawn_by(pipe: SanaSprintPipeline, sampler: Any, steps: int) -> torch.Tensor:
    draws = [generator("cpu", 3, 0, "sample")]
    return sprint_latents(pipe, *sampler.text.encoder.encode(["a red ball"]), draws, steps)


def test_it_is_an_adapter_of_sanas_sprint_pipeline(
    run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every guidance scale; nothing of the teacher's weights is read for it."""
    sampler = open_sampler(run.out, device="cpu")
    ours = {steps: sampler.latents(["a red ball"], steps=steps, guidance=2.5, seed=3) for steps in (1, 2)}

    def unread(*_: object, **__: object) -> None:
        raise AssertionError("weights are read")

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "load", unread)
        call = export_adapter(run.out, tmp_path / "adapter", dtype=torch.float32)
        with pytest.raises(AssertionError, match="weights are read"):
            export(run.out, tmp_path / "whole", dtype=torch.float32)
    assert "SanaSprintPipeline.from_pretrained" in call and call in (tmp_path / "adapter" / "README.md").read_text()
    plain = SanaSprintPipeline.from_pretrained(run.teacher.path, text_encoder=None, tokenizer=None)
    before = drawn_by(plain, sampler, 1)
    plain.scheduler = SCMScheduler.from_pretrained(tmp_path / "adapter", subfolder="scheduler")
    plain.load_lora_weights(tmp_path / "adapter", weight_name="pytorch_lora_weights.safetensors")
    for steps, latents in ours.items():
        torch.testing.assert_close(drawn_by(plain, sampler, steps), latents, rtol=1e-4, atol=1e-4)
    assert float((before - ours[1]).abs().max()) > 0.05


def test_a_pipeline_without_an_embedding_at_that_time_is_refused(run: Config, tmp_path: Path) -> None:
    """SanaSprintPipeline gives its network s, whatever was trained on."""
    config = run.model_copy(update={"teacher": run.teacher.model_copy(update={"timestep_scale": 500.0})})
    (Path(run.out) / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(UserError, match="500 s, and no pipeline of diffusers passes that"):
        export_adapter(run.out, tmp_path / "adapter", dtype=torch.float32)
