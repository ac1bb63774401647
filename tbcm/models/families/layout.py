"""How a network wants its latents: everything outside of it works on [B, C, H, W]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class Layout(Protocol):
    patch: int
    """Pixels of latents that make a token, along one side, before the network makes its own patches."""

    def shape(self, latents: tuple[int, ...]) -> tuple[int, int, int]:
        """(C, H, W) of what is trained on, for the shape of a codec's latents without their batch."""
        ...

    def pack(self, x: Tensor, latents: tuple[int, ...]) -> Any:
        """[B, C, H, W] -> the network's own sample."""
        ...

    def unpack(self, x: Any, latents: tuple[int, ...]) -> Tensor:
        """The inverse of `pack`; additional channels (a learned variance) are dropped."""
        ...


@dataclass(frozen=True)
class Image:
    """[B, C, H, W], as it is."""

    patch = 1

    def shape(self, latents: tuple[int, ...]) -> tuple[int, int, int]:
        channels, height, width = latents
        return channels, height, width

    def pack(self, x: Tensor, latents: tuple[int, ...]) -> Any:
        return x

    def unpack(self, x: Any, latents: tuple[int, ...]) -> Tensor:
        return x[:, : latents[0]]


@dataclass(frozen=True)
class Patches(Image):
    """Tokens [B, HW/4, 4C] of 2 x 2 pixels, their channels outermost within a token (FLUX, Chroma, Qwen-Image)."""

    patch = 2

    def pack(self, x: Tensor, latents: tuple[int, ...]) -> Tensor:
        batch, channels, height, width = x.shape
        x = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)

    def unpack(self, x: Any, latents: tuple[int, ...]) -> Tensor:
        channels, height, width = latents
        x = x.reshape(-1, height // 2, width // 2, channels, 2, 2)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)


@dataclass(frozen=True)
class Tokens(Image):
    """Tokens [B, HW, C] (Flux2, whose codec has made the patches already)."""

    def pack(self, x: Tensor, latents: tuple[int, ...]) -> Tensor:
        return x.flatten(2).mT

    def unpack(self, x: Any, latents: tuple[int, ...]) -> Tensor:
        return x.mT.reshape(-1, *latents)


@dataclass(frozen=True)
class Video(Image):
    """[B, C, T, H, W], seen from outside as [B, C, T H, W]."""

    def shape(self, latents: tuple[int, ...]) -> tuple[int, int, int]:
        channels, frames, height, width = latents
        return channels, frames * height, width

    def pack(self, x: Tensor, latents: tuple[int, ...]) -> Tensor:
        return x.reshape(-1, *latents)

    def unpack(self, x: Any, latents: tuple[int, ...]) -> Tensor:
        return x.reshape(-1, *self.shape(latents))


@dataclass(frozen=True)
class Frames(Image):
    """A list of [C, 1, H, W], one a sample (Z-Image); its answers come stacked."""

    def pack(self, x: Tensor, latents: tuple[int, ...]) -> list[Tensor]:
        return list(x.unsqueeze(2).unbind(0))

    def unpack(self, x: Any, latents: tuple[int, ...]) -> Tensor:
        return x.squeeze(2)
