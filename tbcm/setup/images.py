"""Images of a configuration, their latents, and the autoencoder between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tbcm.config import Config
from tbcm.config.resolution import Size
from tbcm.data.images import CaptionedImages, open_images
from tbcm.data.latents import CaptionedLatents, PrecomputedLatents
from tbcm.errors import UserError
from tbcm.icons.masks import SIZE
from tbcm.models.identity import model_identity
from tbcm.models.loading import black_latents
from tbcm.runtime import distributed
from tbcm.samples.noised import VaeLatents
from tbcm.setup.networks import pipeline_of
from tbcm.setup.precision import dtype_of, weights_dtype


def build_latents(config: Config, device: torch.device) -> tuple[CaptionedLatents, Any]:
    """What the baselines train on: precomputed latents, or images and the VAE that encodes them in every step."""
    data = config.data
    if data.latents is not None:
        precomputed = PrecomputedLatents(data.latents, device)
        precomputed.check(distributed.run_on_main(lambda: latents_identity(config)))
        return precomputed, None
    images = build_images(config)
    vae = build_vae(config, device)
    return VaeLatents(pipeline_of(config), vae, images, device, data.max_bad_share), vae


def build_images(config: Config) -> CaptionedImages:
    """Those of data.images."""
    data = config.data
    assert data.images is not None
    if data.images == "icons" and any(size != (SIZE, SIZE) for size in config.resolution):
        raise UserError(f"data.images=icons: the icons have {SIZE} px: set resolution={SIZE}")
    return open_images(data.images, data.caption_column, data.max_bad_share)


def latents_identity(config: Config) -> dict[str, Any]:
    """What decides an image's latent, but for rounding: a cache must agree with the configuration in all of it."""
    pipeline = pipeline_of(config)
    return {
        "teacher.path": model_identity(pipeline.location, pipeline.revision, ["vae"]),
        "resolution": [list(size) for size in config.resolution],
        "scaling_factor": pipeline.scaling_factor,
    }


def vae_weights(config: Config, device: torch.device) -> torch.dtype:
    """How the weights of a VAE that encodes are kept."""
    return weights_dtype(dtype_of(config.teacher.precision, device))


def build_vae(config: Config, device: torch.device) -> Any:
    """None for a teacher of pixels."""
    vae = pipeline_of(config).load_vae(vae_weights(config, device))
    return vae and vae.to(device)


def build_black_latents(config: Config, device: torch.device) -> dict[Size, Tensor]:
    """Made by rank 0 where the teacher's folder does not carry them, and kept in the run's folder, or with precomputed
    latents."""
    pipeline = pipeline_of(config)
    precomputed = config.data.latents if config.method.from_images else None
    folder = Path(precomputed or config.out)

    def make() -> dict[Size, Tensor]:
        found = black_latents(pipeline, config.resolution, folder, device)
        return {size: black.cpu() for size, black in found.items()}

    return {size: black.to(device) for size, black in distributed.run_on_main(make).items()}
