"""What the package ships."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from tbcm.icons.autoencoder import coloured, encode, psnr
from tbcm.icons.bundle import worded
from tbcm.icons.captions import STYLES, Catalogue
from tbcm.icons.concepts import CONCEPTS
from tbcm.icons.dataset import FEWEST, MOST, Drawings, left_out, load_drawings
from tbcm.icons.packages import LICENSES, UNSEEN_SETS, VERSIONS, package_name
from tbcm.icons.sampler import SHIFT
from tbcm.icons.teacher import read_curve

ASSETS = Path(str(resources.files("tbcm.icons") / "assets"))
MB = 10**6


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def vae() -> AutoencoderDC:
    return AutoencoderDC.from_pretrained(ASSETS / "teacher" / "vae", torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def drawings() -> Drawings:
    return load_drawings(ASSETS)


def some(masks: Tensor, count: int) -> Tensor:
    return coloured(masks[:: len(masks) // count], torch.Generator().manual_seed(0))


def test_sizes() -> None:
    assert size(ASSETS / "teacher") <= 16 * MB
    assert size(ASSETS) <= 22 * MB


def test_every_set_is_named_with_its_version_and_licence() -> None:
    notice = (ASSETS / "NOTICE.md").read_text(encoding="utf-8")
    for prefix, version in VERSIONS.items():
        (line,) = [line for line in notice.splitlines() if f"`{package_name(prefix)}` {version} |" in line]
        assert any(f"[{name}](LICENSES/{name}.txt)" in line for name in LICENSES)
    assert all((ASSETS / "LICENSES" / f"{name}.txt").is_file() for name in LICENSES)


def test_drawings_are_those_of_the_pinned_sets(drawings: Drawings) -> None:
    assert {entry.icon_set for entry in drawings.entries} <= set(VERSIONS)
    assert not {entry.key for entry in drawings.entries} & left_out()
    assert {entry.icon_set for entry in drawings.entries if entry.unseen} == set(UNSEEN_SETS)
    assert drawings.masks.flatten(1).float().std(dim=1).min() > 1  # none is blank
    assert {entry.concept for entry in drawings.entries} == set(CONCEPTS)
    for (concept, style), group in Catalogue(drawings.select(unseen=False).entries).groups.items():
        assert FEWEST <= len(group) <= MOST and style in STYLES, concept
        assert len({drawings.entries[i].icon_set for i in group}) > 1, concept


def test_prompts_share_no_combination_with_held_out_ones(drawings: Drawings) -> None:
    catalogue = Catalogue(drawings.select(unseen=False).entries)
    files = (ASSETS / name for name in ("prompts.txt", "prompts_heldout.txt"))
    seen, unseen = (set(file.read_text(encoding="utf-8").splitlines()) for file in files)
    assert seen == {worded(prompt) for prompt in catalogue.full(held_out=False)}
    assert unseen == {worded(prompt) for prompt in catalogue.full(held_out=True)}
    assert not seen & unseen
    assert 0.05 < len(unseen) / (len(seen) + len(unseen)) < 0.13  # by colour 5 %, and by style
    trained = {(prompt.concept, prompt.style) for prompt in catalogue.full(held_out=False)}
    assert {concept for concept, _ in trained} == set(CONCEPTS)


def test_teacher_loads_with_plain_diffusers() -> None:
    pipeline = SanaPipeline.from_pretrained(ASSETS / "teacher", tokenizer=None, text_encoder=None)
    assert isinstance(pipeline.transformer, SanaTransformer2DModel)
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    # The network's time is s in [0, 1].
    assert pipeline.scheduler.config.num_train_timesteps * pipeline.transformer.config.timestep_scale == 1
    assert pipeline.scheduler.config.shift == SHIFT


def test_how_long_the_teacher_was_trained_is_told() -> None:
    curve = read_curve(ASSETS)
    samples = [row["samples"] for row in curve]
    assert samples == sorted(samples) and samples[0] > 0 and all(row["loss"] > 0 for row in curve)


def test_latents_are_standardised(vae: AutoencoderDC, drawings: Drawings) -> None:
    assert vae.config.scaling_factor == 1
    std, mean = torch.std_mean(encode(vae, some(drawings.masks, 200)), dim=(0, 2, 3))
    assert mean.abs().max() < 0.2
    assert (std - 1).abs().max() < 0.2


def test_drawings_of_unseen_sets_are_reconstructed(vae: AutoencoderDC, drawings: Drawings) -> None:
    assert psnr(vae, some(drawings.select(unseen=True).masks, 100)) > 31  # dB; 32.0 when it was made


def test_black_latent_is_the_latent_of_black(vae: AutoencoderDC) -> None:
    black = load_file(ASSETS / "teacher" / "black_latent.safetensors")["64"]
    expected = encode(vae, torch.zeros(1, 3, 64, 64, dtype=torch.uint8))[0]
    torch.testing.assert_close(black, expected, rtol=1e-3, atol=1e-3)
