"""Writing what `tbcm.data.latents` reads: many writers, each of which may be killed at any time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

import tbcm
from tbcm.data import sharded
from tbcm.data.captions import PromptSource, open_prompts
from tbcm.data.latents import CAPTIONS, LATENTS, SHARD_IMAGES, shard_name, shard_number
from tbcm.data.sharded import MANIFEST, key_of, key_of_settings
from tbcm.errors import UserError
from tbcm.runtime.files import atomic_path, write_json


class LatentWriter:
    """Fills `folder`. A shard knows its captions and what it was made with, so one that is there and whole is never
    made again, not even where images were added at the end. Images that changed behind their captions go unnoticed.

    Args:
        made_with: all that decides the latents, configuration key -> value, and "dtype", which they are kept in.
    """

    def __init__(self, folder: Path, made_with: Mapping[str, Any]) -> None:
        self.folder, self.made_with = folder, dict(made_with)
        self.dtype: torch.dtype = getattr(torch, self.made_with["dtype"])

    def begin(self, captions: Sequence[str]) -> None:
        """Writes the captions. Rank 0 does, before any other touches the folder.

        Raises UserError where the folder holds finished latents that were made with other settings.
        """
        LATENTS.begin(self.folder, self.made_with)
        source = captions if isinstance(captions, PromptSource) else PromptSource.of(self.folder / CAPTIONS, captions)
        table = pa.table({"caption": source.entries})
        with atomic_path(self.folder / CAPTIONS) as part, pa.ipc.new_file(str(part), table.schema) as writer:
            writer.write_table(table)

    @cached_property
    def names(self) -> list[str]:
        """Every file of latents."""
        return [shard_name(number) for number in range(-(-len(self._captions) // SHARD_IMAGES))]

    def indices(self, name: str) -> range:
        """The images of a file."""
        start = shard_number(name) * SHARD_IMAGES
        return range(start, min(start + SHARD_IMAGES, len(self._captions)))

    def is_whole(self, name: str) -> bool:
        """Whether a file is there, of these captions and settings and in its full length."""
        return LATENTS.is_whole(self.folder / name, self._key(name), "latents")

    def write(self, name: str, encoded: Iterable[Tensor], bad: Sequence[int] = ()) -> None:
        """A file from the scaled latents [B, C, h, w] of its images, batch by batch; those of `bad` images are others'.

        Raises UserError where one is not finite.
        """
        latents = torch.cat([some.to(self.dtype).cpu() for some in encoded])
        finite = latents.isfinite().flatten(1).all(1)
        if not finite.all():
            index = self.indices(name)[int(finite.int().argmin())]
            raise UserError(
                f"image {index} ({self._captions[index]!r}): its latent is not finite in {self.made_with['dtype']};"
                " choose another teacher.precision, or take the image out"
            )
        sharded.write(self.folder / name, self._key(name), {"latents": latents}, beside=self.folder / CAPTIONS, bad=bad)

    def finish(self, max_bad_share: float = 0.0) -> dict[str, Any]:
        """Writes the manifest and returns it. Rank 0 does, when all files are there.

        Raises UserError where more than `max_bad_share` of the images are bad.
        """
        for name in {path.name for path in self.folder.glob("latents-*.safetensors")} - set(self.names):
            (self.folder / name).unlink()  # of more images
        files: dict[str, dict[str, Any]] = {CAPTIONS: {}}
        bad: list[int] = []
        for name in self.names:
            metadata, (latents,) = LATENTS.read(self.folder / name, "latents")
            files[name] = {"images": len(latents), "sha256": metadata["sha256"]}
            bad += json.loads(metadata.get("bad", "[]"))
        if len(bad) > max_bad_share * len(self._captions):
            raise UserError(
                f"{len(bad):,} of {len(self._captions):,} images cannot be decoded, more than data.max_bad_share ="
                f" {max_bad_share:g} allows"
            )
        manifest = {
            "format": LATENTS.format,
            "tbcm": tbcm.__version__,
            "made_with": self.made_with,
            "images": len(self._captions),
            "bad": bad,
            "shape": list(latents.shape[1:]),
            "files": {name: {"bytes": (self.folder / name).stat().st_size, **file} for name, file in files.items()},
        }
        write_json(self.folder / MANIFEST, manifest)
        return manifest

    @cached_property
    def _captions(self) -> PromptSource:
        return open_prompts(self.folder / CAPTIONS)

    def _key(self, name: str) -> str:
        images = self.indices(name)
        made_with = key_of_settings(self.made_with)
        return key_of(LATENTS.format, made_with, self._captions.all_texts(images.start, images.stop))
