"""Latents of captioned images that were computed once, read in place of the images and of the VAE.

    OUT/captions.arrow               the images' captions, in the images' order
        latents-00000.safetensors    `latents` [n, C, h, w], scaled (xbar_0), of 1,024 images
        manifest.json                what they were made from and with, and every file's size; written last
        black_latent-*.safetensors   that of a black image, where the teacher's folder has none

They are kept in fp16: scaled latents have a standard deviation of about 1, so it has range to spare, and its eleven
significant bits are worth more than bfloat16's eight at the same size. fp32 is for comparing runs to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt
from torch import Tensor

from tbcm.config.resolution import Size
from tbcm.data.bad import next_good
from tbcm.data.captions import PromptSource, open_prompts
from tbcm.data.sharded import Kind, Manifest, differences
from tbcm.errors import UserError
from tbcm.runtime.phases import phase


class MadeWith(BaseModel):
    dtype: Literal["float16", "float32"]


class LatentsManifest(Manifest):
    made_with: MadeWith  # type: ignore[assignment]
    images: PositiveInt
    shape: Annotated[list[PositiveInt], Field(min_length=3, max_length=3)]
    bad: list[NonNegativeInt] = Field(default_factory=list)


LATENTS = Kind("latents", "tbcm.encode_images", 1, LatentsManifest)
CAPTIONS = "captions.arrow"
SHARD_IMAGES = 1024
"""67 MB at 1,024 pixels (32 x 32 x 32 numbers each); what a killed process has to do again."""


class CaptionedLatents(Protocol):
    """Clean latents with one caption each."""

    @property
    def captions(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def latents(self, indices: Sequence[int], size: Size) -> tuple[Tensor, list[int]]:
        """Those in that order, of images of that size: scaled latents xbar_0 [B, C, h, w], fp32, on the training's
        device; and which they are: a bad image gives its place to the next that is good."""
        ...


class PrecomputedLatents:
    """`CaptionedLatents` from files.

    Args:
        folder: what `tbcm.encode_images` wrote.
        device: where latents are wanted. The host does not wait for their copy to a GPU.

    Raises:
        UserError: there is no finished cache, or one of its files is missing or cut.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        self.folder, self.device = Path(folder), torch.device(device)
        self.manifest = LATENTS.open(self.folder)
        self.captions: PromptSource = open_prompts(self.folder / CAPTIONS)
        self._dtype: torch.dtype = getattr(torch, self.manifest["made_with"]["dtype"])
        self._shape: list[int] = self.manifest["shape"]
        self._bad = set(self.manifest.get("bad", []))
        if len(self) != self.manifest["images"] or len(self._bad) >= len(self):
            raise LATENTS.damaged(self.folder / CAPTIONS, "it has other images than the manifest tells")
        self._shards: dict[str, Tensor] = {}

    def check(self, wanted: Mapping[str, Any]) -> None:
        """Raises UserError where the latents were not made with `wanted`: configuration key -> value."""
        if different := differences(self.manifest["made_with"], wanted):
            raise UserError(
                f"data.latents={self.folder} does not match (latents -> configuration): {different};"
                " change the configuration, or run tbcm.encode_images with it into another folder"
            )

    def __len__(self) -> int:
        return len(self.captions)

    def latents(self, indices: Sequence[int], size: Size) -> tuple[Tensor, list[int]]:
        """See `CaptionedLatents`. Raises UserError where a file turns out to be damaged."""
        taken = [next_good(index, self._bad, len(self)) for index in indices]
        with phase("latents"):
            found = torch.empty(len(indices), *self._shape, dtype=self._dtype, pin_memory=self.device.type == "cuda")
            for latent, index in zip(found, taken, strict=True):
                number, place = divmod(index, SHARD_IMAGES)
                latent.copy_(self._shard(shard_name(number))[place])
            return found.to(self.device, non_blocking=True).float(), taken

    def _shard(self, name: str) -> Tensor:
        if name not in self._shards:
            metadata, (latents,) = LATENTS.read(self.folder / name, "latents")
            if metadata.get("sha256") != self.manifest["files"].get(name, {}).get("sha256"):
                raise UserError(f"{self.folder / name}: was encoded again since this run began; start it again")
            count = min(SHARD_IMAGES, len(self) - SHARD_IMAGES * shard_number(name))
            if list(latents.shape) != [count, *self._shape] or latents.dtype != self._dtype:
                raise LATENTS.damaged(self.folder / name, "its latents are not of the kind that the manifest tells")
            self._shards[name] = latents
        return self._shards[name]


def shard_number(name: str) -> int:
    return int(name.removeprefix("latents-").removesuffix(".safetensors"))


def shard_name(number: int) -> str:
    return f"latents-{number:05d}.safetensors"
