"""What the package ships."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from tbcm.emoji.autoencoder import encode, psnr
from tbcm.emoji.dataset import concept_of, read_atlas

ASSETS = Path(str(resources.files("tbcm.emoji") / "assets"))
MB = 10**6


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def vae() -> AutoencoderDC:
    return AutoencoderDC.from_pretrained(ASSETS / "teacher" / "vae", torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def real() -> tuple[Tensor, list[dict[str, object]]]:
    rows = json.loads((ASSETS / "real.json").read_text(encoding="utf-8"))["images"]
    return read_atlas(ASSETS / "real.webp", len(rows)), rows


def test_sizes() -> None:
    assert size(ASSETS / "teacher") <= 16 * MB
    assert size(ASSETS) <= 30 * MB


def test_every_set_is_named_with_its_licence() -> None:
    notice = (ASSETS / "NOTICE.md").read_text(encoding="utf-8")
    for package in ("noto` 1.2.9", "noto-v1` 1.2.5", "fluent-emoji` 1.2.7", "fluent-emoji-flat` 1.2.6"):
        assert package in notice
    assert "Apache License" in (ASSETS / "LICENSES" / "Apache-2.0.txt").read_text()
    assert "Copyright (c) Microsoft" in (ASSETS / "LICENSES" / "MIT-fluentui-emoji.txt").read_text()


def test_prompts_share_no_concept_with_held_out_ones() -> None:
    def concepts(name: str) -> tuple[set[str], set[str]]:
        lines = (ASSETS / name).read_text(encoding="utf-8").splitlines()
        words, styles = zip(*(line.rsplit(", ", 1) for line in lines), strict=True)
        return {concept_of(word.replace(" ", "-")) for word in words}, set(styles)

    (seen, styles), (unseen, _) = concepts("prompts.txt"), concepts("prompts_heldout.txt")
    assert not seen & unseen
    assert styles == {"noto", "noto v1", "fluent", "fluent flat"}
    assert 0.03 < len(unseen) / (len(seen) + len(unseen)) < 0.07


def test_real_images_match_their_captions_and_flags(real: tuple[Tensor, list[dict[str, object]]]) -> None:
    images, rows = real
    assert images.shape == (2400, 3, 64, 64)
    unseen = set((ASSETS / "prompts_heldout.txt").read_text(encoding="utf-8").splitlines())
    assert {row["caption"] for row in rows if row["held_out"]} == unseen
    assert images.float().flatten(1).std(dim=1).gt(1).float().mean() > 0.99  # next to none is blank


def test_teacher_loads_with_plain_diffusers() -> None:
    pipeline = SanaPipeline.from_pretrained(ASSETS / "teacher", tokenizer=None, text_encoder=None)
    assert isinstance(pipeline.transformer, SanaTransformer2DModel)
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    # The network's time is s in [0, 1].
    assert pipeline.scheduler.config.num_train_timesteps * pipeline.transformer.config.timestep_scale == 1


def test_latents_are_standardised(vae: AutoencoderDC, real: tuple[Tensor, list[dict[str, object]]]) -> None:
    assert vae.config.scaling_factor == 1
    std, mean = torch.std_mean(encode(vae, real[0][::12]), dim=(0, 2, 3))
    assert mean.abs().max() < 0.15
    assert (std - 1).abs().max() < 0.2


def test_held_out_images_are_reconstructed(vae: AutoencoderDC, real: tuple[Tensor, list[dict[str, object]]]) -> None:
    images, rows = real
    unseen = torch.tensor([bool(row["held_out"]) for row in rows])
    assert psnr(vae, images[unseen][::3]) > 25  # dB; 26.0 when it was made


def test_black_latent_is_the_latent_of_black(vae: AutoencoderDC) -> None:
    black = load_file(ASSETS / "teacher" / "black_latent.safetensors")
    assert list(black) == ["64"] and black["64"].dtype == torch.float32
    with torch.no_grad():
        expected = vae.encode(torch.full((1, 3, 64, 64), -1.0)).latent[0]
    torch.testing.assert_close(black["64"], expected, rtol=1e-4, atol=1e-4)
