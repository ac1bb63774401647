from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import SanaPipeline
from torch import Tensor

from tbcm.emoji import autoencoder, teacher
from tbcm.emoji.cache import Cache
from tbcm.emoji.teacher import flow_loss, load_autoencoder, make_transformer, sample_times, validation_loss
from tbcm.emoji.training import Budget
from tbcm.errors import UserError


def cache_of(count: int) -> Cache:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, 8, 8, 8, generator=generator)
    return Cache(latents, torch.randn(count, 16, 384, generator=generator), torch.ones(count, 16, dtype=torch.bool))


def test_network_is_small_and_takes_time_from_zero_to_one() -> None:
    model = make_transformer()
    assert 5.2e6 < sum(p.numel() for p in model.parameters()) < 5.5e6
    assert 1000 * model.config.timestep_scale == 1  # 1000 scheduler steps
    assert model.config.qk_norm == "rms_norm_across_heads" and not model.config.guidance_embeds
    batch = cache_of(2)
    out = model(batch.latents, batch.embeds, torch.tensor([0.0, 1.0]), encoder_attention_mask=batch.mask).sample
    assert out.shape == batch.latents.shape


def test_flow_loss_vanishes_for_the_velocity_that_leads_to_the_data() -> None:
    batch, s = cache_of(3), torch.tensor([0.1, 0.5, 0.9])
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))

    def towards_data(
        x: Tensor, embeds: Tensor, time: Tensor, encoder_attention_mask: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        assert torch.equal(time, s) and torch.equal(encoder_attention_mask, batch.mask)
        return ((x - batch.latents) / time[:, None, None, None],)  # e - xbar_0 = (x_s - xbar_0)/s

    def off_by_two(*args: Tensor, **kwargs: Tensor) -> tuple[Tensor]:
        return (towards_data(*args, **kwargs)[0] + 2,)  # type: ignore[arg-type]

    assert flow_loss(towards_data, batch, s, noise).item() == pytest.approx(0, abs=1e-9)  # type: ignore[arg-type]
    assert flow_loss(off_by_two, batch, s, noise).item() == pytest.approx(4, abs=1e-4)  # type: ignore[arg-type]


def test_times_are_logit_normal() -> None:
    s = sample_times(100_000, torch.Generator().manual_seed(0))
    logits = torch.logit(s.double())
    assert logits.mean().item() == pytest.approx(0.3, abs=5 * 1.2 / math.sqrt(100_000))
    assert logits.std().item() == pytest.approx(1.2, abs=0.02)


def test_validation_loss_does_not_depend_on_the_random_state() -> None:
    model, cache = make_transformer().eval(), cache_of(4)
    first = validation_loss(model, cache)
    torch.manual_seed(123)
    assert validation_loss(model, cache) == first


def test_missing_autoencoder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no autoencoder.*python -m tbcm\.emoji\.autoencoder"):
        load_autoencoder(tmp_path, "cpu")


def test_recipe_writes_assets_that_plain_diffusers_loads(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Constant:
        """A text encoder that says the same to every prompt, so that no weights are needed."""

        def __init__(self, max_tokens: int, device: str) -> None:
            self.max_tokens = max_tokens

        def encode(self, prompts: list[str], *, instruct: bool = True) -> tuple[Tensor, Tensor]:
            shape = (len(prompts), self.max_tokens)
            return torch.ones(*shape, 384), torch.ones(shape, dtype=torch.bool)

    monkeypatch.setattr(teacher, "MiniLMEncoder", Constant)
    monkeypatch.setattr("tbcm.emoji.sampler.COLUMNS", 2)
    autoencoder.train(data, tmp_path / "vae", Budget(steps=1), "cpu")
    out = tmp_path / "assets"
    teacher.train(data, tmp_path / "vae", out, Budget(steps=2), "cpu")
    pipeline = SanaPipeline.from_pretrained(out / "teacher", tokenizer=None, text_encoder=None)
    assert pipeline.transformer.config.patch_size == 2 and pipeline.vae_scale_factor == 8
    assert (out / "prompts.txt").read_text().splitlines()[:2] == ["cat, fluent", "cat, fluent flat"]
    assert len((out / "prompts_heldout.txt").read_text().splitlines()) == 4
    assert (tmp_path / "assets-preview.png").is_file()
