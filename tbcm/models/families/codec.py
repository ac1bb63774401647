"""Images to latents and back, for every class of autoencoder, at the scale that diffusion works on (std about 1).

A codec is made of an autoencoder's configuration, which is enough to know the latents' shape; `encode` and `decode`
are given the autoencoder itself. Images are [N, 3, H, W] in [-1, 1], latents [N, C, h, w], both fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tbcm.errors import UserError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Codec:
    """AutoencoderKL: z = xbar_0 std / scale + mean (or shift), with mean and std by channel where it has them.

    Args:
        unit: what xbar_0 is multiplied by before (EDM's data have another std than 1).
        frames: of a sample, in pixel space: 1, but for video.
    """

    config: Config
    unit: float = 1.0
    frames: int = 1

    @property
    def compression(self) -> int:
        """Pixels per latent, along one side."""
        return int(2 ** (len(self.config["block_out_channels"]) - 1))

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """Of one sample's latents, for pixels height x width."""
        return self.config["latent_channels"], height // self.compression, width // self.compression

    @torch.no_grad()
    def encode(self, vae: Any, images: Tensor) -> Tensor:
        """The mode of the posterior, not a draw from it."""
        return self.scaled(vae.encode(images.to(vae.dtype)).latent_dist.mode().float())

    @torch.no_grad()
    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        return vae.decode(self.unscaled(latents).to(vae.dtype), return_dict=False)[0].float()

    def scaled(self, z: Tensor) -> Tensor:
        """An autoencoder's latents -> xbar_0."""
        mean, std = self._statistics(z)
        return (z - mean) / std

    def unscaled(self, latents: Tensor) -> Tensor:
        """xbar_0 -> an autoencoder's latents."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Of the autoencoder's latents, by channel."""
        scale = self.config.get("scaling_factor") or 1.0
        if self.config.get("latents_mean") is None or self.config.get("latents_std") is None:
            return self.config.get("shift_factor") or 0.0, self.unit / scale
        mean, std = (_channels(self.config[key], like) for key in ("latents_mean", "latents_std"))
        return mean, std * self.unit / scale


class DeepCompression(Codec):
    """AutoencoderDC: deterministic."""

    @property
    def compression(self) -> int:
        return int(2 ** (len(self.config["encoder_block_out_channels"]) - 1))

    @torch.no_grad()
    def encode(self, vae: Any, images: Tensor) -> Tensor:
        return self.scaled(vae.encode(images.to(vae.dtype), return_dict=False)[0].float())


class Video(Codec):
    """AutoencoderKLWan: [N, C, T, h, w], seen from outside as [N, C, T h, w]."""

    @property
    def compression(self) -> int:
        return int(self.config.get("scale_factor_spatial") or 2 ** len(self.config["temperal_downsample"]))

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        spatial = height // self.compression, width // self.compression
        return self.config["z_dim"], self._latent_frames, *spatial

    @property
    def temporal(self) -> int:
        """Frames per latent, but for the first one, which has its own."""
        return int(self.config.get("scale_factor_temporal") or 2 ** sum(self.config["temperal_downsample"]))

    @property
    def _latent_frames(self) -> int:
        return (self.frames - 1) // self.temporal + 1

    @torch.no_grad()
    def encode(self, vae: Any, images: Tensor) -> Tensor:
        """Of videos whose frames stand one below the other."""
        frames = images.unflatten(2, (self.frames, -1))
        return self.scaled(vae.encode(frames.to(vae.dtype)).latent_dist.mode().float()).flatten(2, 3)

    @torch.no_grad()
    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """The inverse."""
        z = self.unscaled(latents.unflatten(2, (self._latent_frames, -1)))
        return vae.decode(z.to(vae.dtype), return_dict=False)[0].float().flatten(2, 3)


class Frame(Video):
    """AutoencoderKLQwenImage: a video of one frame, of which the network is told nothing."""

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        channels, _, *spatial = super().shape(height, width)
        return channels, *spatial


@dataclass(frozen=True)
class Flux2(Codec):
    """AutoencoderKLFlux2: patches of 2 x 2 latents as channels, standardised by a batch norm's running statistics."""

    @property
    def compression(self) -> int:
        return 2 * super().compression

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        return 4 * self.config["latent_channels"], height // self.compression, width // self.compression

    @torch.no_grad()
    def encode(self, vae: Any, images: Tensor) -> Tensor:
        z = torch.nn.functional.pixel_unshuffle(vae.encode(images.to(vae.dtype)).latent_dist.mode().float(), 2)
        mean, std = self._norm(vae)
        return (z - mean) / std

    @torch.no_grad()
    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = self._norm(vae)
        z = torch.nn.functional.pixel_shuffle(latents * std + mean, 2)
        return vae.decode(z.to(vae.dtype), return_dict=False)[0].float()

    def _norm(self, vae: Any) -> tuple[Tensor, Tensor]:
        std = torch.sqrt(vae.bn.running_var.float() + self.config["batch_norm_eps"])
        return vae.bn.running_mean.float()[:, None, None], std[:, None, None]


class Pixels(Codec):
    """No autoencoder: images themselves. `config` is the network's."""

    @property
    def compression(self) -> int:
        return 1

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        return self.config["in_channels"], height, width

    def encode(self, vae: Any, images: Tensor) -> Tensor:
        return images.float() / self.unit

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        return latents.float() * self.unit


CODECS: dict[str, type[Codec]] = {
    "AutoencoderKL": Codec,
    "AutoencoderDC": DeepCompression,
    "AutoencoderKLWan": Video,
    "AutoencoderKLQwenImage": Frame,
    "AutoencoderKLFlux2": Flux2,
}


def codec_of(autoencoder: str, config: Config, unit: float = 1.0, frames: int = 1) -> Codec:
    """Of an autoencoder's class and configuration. Raises UserError for a class without a codec."""
    if autoencoder not in CODECS:
        raise UserError(f"its autoencoder is {autoencoder}; known: {', '.join(sorted(CODECS))}")
    return CODECS[autoencoder](config, unit, frames)


def _channels(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(-1, *(1,) * (like.dim() - 2))
