"""What a family's pipeline tells its network of prompts, computed once and read in place of its text encoders.

    OUT/prompts.arrow             the distinct prompts and their sorted order, as with `tbcm.data.embeddings`
        null.safetensors          the condition of the unconditional branch, and static values, for each size
        shard-00000.safetensors   those of 1,024 prompts
        manifest.json             what they were made from and with, and every file's size; written last
        prompts/                  the file they came from, clean

A prompt's tensors have shapes of their own (text may be ragged). A shard holds of each name "values/NAME", all prompts'
numbers end to end, and "shapes/NAME" [prompts, dimensions]. NAME is "SIZE/ARGUMENT"; what is the same for every size of
images is there for the first size alone. Static values are "static/BRANCH/SIZE/ARGUMENT", and those that are no tensors
together, as JSON in bytes, "plain/BRANCH/SIZE".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tbcm.config.resolution import Size, shown_size
from tbcm.data.embeddings import NULL, PROMPTS, SHARD_PROMPTS, Distinct, check_made_with, shard_name
from tbcm.data.sharded import Kind, Manifest
from tbcm.errors import UserError
from tbcm.method.types import Condition
from tbcm.models.families.family import LENGTH


class ConditionsManifest(Manifest):
    made_from: dict[str, Any]


CONDITIONS = Kind("conditions", "tbcm.encode", 1, ConditionsManifest)
GIVEN, WITHOUT = "given", "null"
"""Whose static values: a prompt's, or the unconditional branch's."""


class CachedConditions:
    """`tbcm.samples.rollouts.Text` from files.

    Args:
        folder: what `tbcm.encode` wrote for a teacher of any family but Sana.
        device: where conditions are wanted.

    Raises:
        UserError: there is no finished cache, or one of its files is missing or cut.
    """

    null_mask = "own"

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        self.folder, self.device = Path(folder), torch.device(device)
        self.manifest = CONDITIONS.open(self.folder)
        self._distinct = Distinct(self.folder / PROMPTS, CONDITIONS)
        self._shards: dict[str, dict[str, Tensor]] = {}
        self._first = shown_size(tuple(self.manifest["made_with"]["resolution"][0]))

    @property
    def modules(self) -> list[nn.Module]:
        return []

    def check(self, wanted: Mapping[str, Any]) -> None:
        """Raises UserError where the cache was not made from and with `wanted`: configuration key -> value."""
        check_made_with(self.folder, self.manifest, wanted)

    def __contains__(self, prompt: str) -> bool:
        return self._distinct.row(prompt) is not None

    def __call__(self, prompts: Sequence[str], size: Size) -> Condition:
        """Raises UserError for a prompt that was not encoded, and where a file turns out to be damaged."""
        static = self._static(GIVEN, size)
        return Condition.cat(*(Condition(self._tensors(*self._place(prompt), size), static) for prompt in prompts))

    def null_prompt(self, size: Size) -> Condition | None:
        tensors = self._tensors(NULL, 0, size)
        return Condition(tensors, self._static(WITHOUT, size)) if tensors else None

    def _place(self, prompt: str) -> tuple[str, int]:
        row = self._distinct.row(prompt)
        if row is None:
            raise UserError(f"{self.folder} has no condition of the prompt {prompt!r}: it was made from other prompts")
        shard, place = divmod(row, SHARD_PROMPTS)
        return shard_name(shard), place

    def _tensors(self, name: str, place: int, size: Size) -> dict[str, Tensor]:
        """Of one prompt [1, ...]."""
        shard, found = self._shard(name), {}
        for where in (self._first, shown_size(size)):  # what differs from the first size's takes its place
            for key in (key for key in shard if key.startswith(f"values/{where}/")):
                argument = key.removeprefix(f"values/{where}/")
                row = _row(shard[key], shard[f"shapes/{where}/{argument}"], place)[None]
                found[argument] = (
                    row if argument.endswith(LENGTH) else row.to(self.device)
                )  # lengths: a host needs them
        return found

    def _static(self, whose: str, size: Size) -> dict[str, Any]:
        stored, where = self._shard(NULL), f"{whose}/{shown_size(size)}"
        plain: dict[str, Any] = json.loads(bytes(stored[f"plain/{where}"].tolist()))
        prefix = f"static/{where}/"
        return plain | {
            key.removeprefix(prefix): value.to(self.device) for key, value in stored.items() if key.startswith(prefix)
        }

    def _shard(self, name: str) -> dict[str, Tensor]:
        if name not in self._shards:
            metadata, tensors = CONDITIONS.read_all(self.folder / name)
            if metadata.get("sha256") != self.manifest["files"].get(name, {}).get("sha256"):
                raise UserError(f"{self.folder / name}: was encoded again since this run began; start it again")
            self._shards[name] = tensors
        return self._shards[name]


def _row(values: Tensor, shapes: Tensor, place: int) -> Tensor:
    sizes = shapes.prod(1)
    start = int(sizes[:place].sum())
    return values[start : start + int(sizes[place])].view(shapes[place].tolist())


def rows(condition: Condition) -> list[dict[str, Tensor]]:
    """Each prompt's tensors, without the padding of ragged text, whose length is beside it."""
    found = []
    for place in range(len(condition)):
        tensors = {name: value[place] for name, value in condition.tensors.items()}
        for name in list(tensors):
            if name + LENGTH in tensors:
                tensors[name] = tensors[name][: int(tensors[name + LENGTH])]
        found.append(tensors)
    return found
