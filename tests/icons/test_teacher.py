from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaPipeline
from torch import Tensor

from tbcm.errors import UserError
from tbcm.icons import autoencoder, captions, teacher
from tbcm.icons.captions import Prompt
from tbcm.icons.dataset import Drawing
from tbcm.icons.groups import Sampler, captions_of
from tbcm.icons.teacher import (
    Batch,
    Batches,
    flow_loss,
    load_autoencoder,
    make_transformer,
    read_curve,
    sample_times,
)
from tbcm.icons.training import Budget


def test_network_is_small_and_takes_time_from_zero_to_one() -> None:
    model = make_transformer()
    assert 5e6 < sum(p.numel() for p in model.parameters()) < 6.4e6
    assert 1000 * model.config.timestep_scale == 1  # 1000 scheduler steps
    assert model.config.qk_norm == "rms_norm_across_heads" and not model.config.guidance_embeds
    mask = torch.ones(2, 16, dtype=torch.bool)
    x, embeds = torch.randn(2, 8, 8, 8), torch.randn(2, 16, 384)
    assert model(x, embeds, torch.tensor([0.0, 1.0]), encoder_attention_mask=mask).sample.shape == x.shape


def test_flow_loss_vanishes_for_the_target() -> None:
    x, target = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    batch = Batch(x, torch.tensor([0.1, 0.5, 0.9]), (torch.ones(3, 1, 1), torch.ones(3, 1, dtype=torch.bool)), target)

    def velocity(x: Tensor, embeds: Tensor, s: Tensor, encoder_attention_mask: Tensor, return_dict: bool) -> Any:
        assert torch.equal(x, batch.x) and torch.equal(s, batch.s)
        return (target,)

    assert flow_loss(velocity, batch).item() == 0  # type: ignore[arg-type]
    assert flow_loss(lambda *a, **k: (target + 2,), batch).item() == pytest.approx(4)  # type: ignore[arg-type,return-value]


def test_times_are_logit_normal() -> None:
    s = sample_times(100_000, torch.Generator().manual_seed(0))
    logits = torch.logit(s.double())
    assert logits.mean().item() == pytest.approx(0.3, abs=5 * 1.2 / math.sqrt(100_000))
    assert logits.std().item() == pytest.approx(1.2, abs=0.02)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    """Two solid keys of known latents; the text state of a caption is its row."""
    monkeypatch.setattr(captions, "colour_is_held_out", lambda concept, fg: False)
    sampler = Sampler([Drawing("s", name, "key", "solid") for name in "ab"])
    latents = torch.randn(2, 32, 1, 2, 2, generator=torch.Generator().manual_seed(0)).half()
    texts = sorted({caption for some in captions_of(sampler.prompts()).values() for caption in some})
    states = (torch.arange(len(texts)).half()[:, None, None].expand(-1, 3, 1), torch.full((len(texts),), 2))
    null = (torch.full((1, 3, 1), -1.0), torch.tensor([[True, False, False]]))
    return Batches(sampler, latents, texts, states, null)


def test_a_batch_regresses_on_the_mean_of_the_groups_velocity(
    batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "CAPTION_DROPOUT", 0.0)
    drawn: list[tuple[int, Prompt]] = []
    draw = batches.sampler.draw
    monkeypatch.setattr(batches.sampler, "draw", lambda rng: drawn.append(draw(rng)) or drawn[-1])
    batch = batches.draw(40, torch.Generator().manual_seed(0))
    for i, (row, prompt) in enumerate(drawn):
        x, s = batch.x[i].flatten().double(), batch.s[i].double()
        group = batches.sampler.group(prompt)
        assert group is not None and row in group.rows.tolist()
        allowed = batches.latents[group.rows].double()
        weight = torch.exp(-((x - (1 - s) * allowed) ** 2).sum(1) / (2 * s * s))  # an even prior: one style only
        mean = (weight[:, None] * allowed).sum(0) / weight.sum()
        torch.testing.assert_close(batch.target[i].flatten().double(), (x - mean) / s, rtol=1e-3, atol=1e-3)
        caption = list(batches.row_of)[int(batch.text[0][i, 0, 0])]
        assert caption in batches.captions[prompt]
        assert batch.text[1][i].tolist() == [True, True, False]


def test_a_dropped_caption_is_the_null_prompt_with_the_plain_target(
    batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "CAPTION_DROPOUT", 1.0)
    rows: list[int] = []
    draw = batches.sampler.draw

    def noted(rng: Any) -> tuple[int, Prompt]:
        rows.append(draw(rng)[0])
        return rows[-1], Prompt("key")

    monkeypatch.setattr(batches.sampler, "draw", noted)
    monkeypatch.setattr(batches, "captions", {Prompt("key"): [next(iter(batches.row_of))]})
    batch = batches.draw(8, torch.Generator().manual_seed(0))
    assert (batch.text[0] == -1).all() and batch.text[1].tolist() == [[True, False, False]] * 8
    x0, s = batches.latents[rows].float(), batch.s[:, None]
    x = batch.x.flatten(1)
    torch.testing.assert_close(batch.target.flatten(1), (x - x0) / s, rtol=1e-3, atol=1e-3)  # e - xbar_0


def test_missing_autoencoder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no autoencoder.*python -m tbcm\.icons\.autoencoder"):
        load_autoencoder(tmp_path)


def test_what_one_goes_on_from_is_not_written_to(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="assets is what the training goes on from"):
        teacher.train(tmp_path / "work", tmp_path / "assets", Budget(steps=1), "cpu", tmp_path / "x" / ".." / "assets")


class Constant:
    """A text encoder that says the same to every prompt, so that no weights are needed."""

    dim = 384

    def __init__(self, max_tokens: int, device: str) -> None:
        self.max_tokens = max_tokens

    def tokenizer(self, captions: list[str], truncation: bool, max_length: int) -> dict[str, Any]:
        return {"input_ids": [[0] * 5 for _ in captions]}

    def encode(self, prompts: list[str], *, instruct: bool = True) -> tuple[Tensor, Tensor]:
        shape = (len(prompts), self.max_tokens)
        return torch.ones(*shape, 384), torch.ones(shape, dtype=torch.bool)


def test_recipe_writes_assets_that_plain_diffusers_loads_and_goes_on_from_them(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "MiniLMEncoder", Constant)
    monkeypatch.setattr(teacher, "PREVIEW", ("solid red heart on white",))
    monkeypatch.setattr(teacher, "PREVIEW_ROWS", 1)
    monkeypatch.setattr(teacher, "BATCH", 4)
    autoencoder.train(data, data / "autoencoder", Budget(steps=1), "cpu")
    out = tmp_path / "assets"
    teacher.train(data, out, Budget(steps=2), "cpu")
    pipeline = SanaPipeline.from_pretrained(out / "teacher", tokenizer=None, text_encoder=None)
    assert pipeline.transformer.config.patch_size == 2 and pipeline.vae_scale_factor == 8
    assert any("heart" in line for line in (out / "prompts.txt").read_text().splitlines())
    assert (tmp_path / "assets-preview.png").is_file()
    assert [row["samples"] for row in read_curve(out)] == [2 * 4]
    # On another machine nothing is left but the assets.
    again, other = tmp_path / "again", tmp_path / "other"
    teacher.train(other, again, Budget(steps=1), "cpu", resume_from=out)
    assert [row["samples"] for row in read_curve(again)] == [2 * 4, 3 * 4]
    before, after = (
        SanaPipeline.from_pretrained(f / "teacher", tokenizer=None, text_encoder=None) for f in (out, again)
    )
    old, new = (dict(p.transformer.named_parameters()) for p in (before, after))
    assert all((new[name] - value).abs().max() < 1e-2 for name, value in old.items())  # one step away
    for one, other in zip(before.vae.parameters(), after.vae.parameters(), strict=True):
        assert torch.equal(one, other)
