from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderDC
from torch import Tensor

from tbcm.icons.autoencoder import (
    decode,
    encode,
    export,
    fold_scale,
    make_autoencoder,
    off_centre,
    psnr,
    reconstruction_loss,
    train,
)
from tbcm.icons.training import Budget


def noise_images(count: int) -> Tensor:
    return torch.randint(256, (count, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_it_is_small_and_eight_times_smaller_both_ways() -> None:
    vae = make_autoencoder()
    assert sum(p.numel() for p in vae.parameters()) < 2.5e6
    assert vae.encode(torch.zeros(2, 3, 64, 64)).latent.shape == (2, 8, 8, 8)
    assert vae.spatial_compression_ratio == 8 and vae.config.scaling_factor == 1


def test_folding_the_scale_changes_latents_but_not_reconstructions() -> None:
    torch.manual_seed(0)
    vae = make_autoencoder().double().eval()
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64) * 2 - 1
    std = torch.linspace(0.1, 7, 8, dtype=torch.float64)
    with torch.no_grad():
        latents = vae.encoder(x)
        image = vae.decoder(latents)
        fold_scale(vae, std)
        folded = vae.encoder(x)
    torch.testing.assert_close(folded, latents / std[None, :, None, None], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(vae.decoder(folded), image, rtol=1e-10, atol=1e-10)


def test_export_standardises_and_leaves_the_module_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae, images = make_autoencoder().eval(), noise_images(6)
    before = encode(vae, images)
    export(vae, images, tmp_path / "vae")
    exported = AutoencoderDC.from_pretrained(tmp_path / "vae").eval()
    torch.testing.assert_close(encode(exported, images).std(dim=(0, 2, 3)), torch.ones(8))
    torch.testing.assert_close(decode(exported, encode(exported, images)), decode(vae, before), rtol=1e-4, atol=1e-4)
    assert torch.equal(encode(vae, images), before)


def test_reconstruction_loss_by_hand() -> None:
    target = torch.zeros(1, 3, 4, 4)
    flat = torch.full_like(target, 0.5)  # |e| = 0.5, e^2 = 0.25, no edges
    assert reconstruction_loss(flat, target).item() == pytest.approx(0.75)
    stripes = torch.tensor([0.5, -0.5, 0.5, -0.5]).expand(1, 3, 4, 4)  # every horizontal difference is 1
    assert reconstruction_loss(stripes, target).item() == pytest.approx(1.75)
    assert reconstruction_loss(stripes.mT, target).item() == pytest.approx(1.75)


def test_off_centre_is_the_squared_mean_in_standard_deviations() -> None:
    values = torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = (values - values.mean((0, 2, 3), keepdim=True)) / values.std((0, 2, 3), keepdim=True)
    assert off_centre(values).item() == pytest.approx(0, abs=1e-20)
    shifted = torch.stack([7 * (values[:, 0] + 0.5), 0.1 * values[:, 1]], dim=1)
    assert off_centre(shifted).item() == pytest.approx(0.25 / 2)


def test_psnr_of_a_known_error() -> None:
    class Shifted:
        """Encodes to itself and decodes 0.02 brighter."""

        device, dtype, config = torch.device("cpu"), torch.float32, SimpleNamespace(scaling_factor=1.0)

        def encode(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(latent=x)

        def decode(self, z: Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=z + 0.02)

    grey = torch.full((3, 3, 64, 64), 100, dtype=torch.uint8)
    assert psnr(Shifted(), grey) == pytest.approx(40.0, abs=1e-3)  # type: ignore[arg-type]  # 20 log10(2/0.02)


def test_recipe_writes_an_autoencoder(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(data, tmp_path / "vae", Budget(steps=2), "cpu")
    vae = AutoencoderDC.from_pretrained(tmp_path / "vae")
    assert vae.config.scaling_factor == 1
    assert "2 steps, PSNR on unseen sets" in capsys.readouterr().out
