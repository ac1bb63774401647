"""Text states that were computed once, read in place of a text encoder.

    OUT/prompts.arrow             the distinct prompts in order of first appearance, and their sorted order
        null.safetensors          the states of the null prompt
        shard-00000.safetensors   those of 1,024 prompts, end to end, without padding
        manifest.json             what they were made from and with, and every file's size; written last
        prompts/                  the file they came from, clean (see `tbcm.data.prompts`)

Prompts are found by their text, so this goes wherever a text encoder goes. Shards are safetensors: a read from the map
costs what copying the bytes costs, and no file is held open, of which a large cache would have more than a process may.
Training looks at sizes only; reading hundreds of GB to check digests is for `tbcm.encode --verify`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor
from torch.nn import functional

from tbcm.data.captions import map_table
from tbcm.data.sharded import Kind, Manifest, differences
from tbcm.errors import UserError


class MadeWith(BaseModel):
    max_tokens: PositiveInt = Field(alias="text.max_tokens")
    dtype: Literal["bfloat16", "float32"]


class StatesManifest(Manifest):
    made_with: MadeWith  # type: ignore[assignment]
    made_from: dict[str, Any]
    dim: PositiveInt


STATES = Kind("text states", "tbcm.encode", 1, StatesManifest)
PROMPTS, NULL = "prompts.arrow", "null.safetensors"
SHARD_PROMPTS = 1024
"""At most 1.4 GB: 300 tokens of 2,304 bf16 numbers each."""


def check_made_with(folder: Path, manifest: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UserError where the cache was not made from and with `wanted`: configuration key -> value."""
    if different := differences({**manifest["made_from"], **manifest["made_with"]}, wanted):
        raise UserError(
            f"text.cache={folder} does not match (cache -> configuration): {different};"
            " change the configuration, or run tbcm.encode with it into another folder"
        )


class CachedEncoder:
    """A `tbcm.models.text.TextEncoder` that looks up what another one computed.

    Args:
        folder: what `tbcm.encode` wrote.
        device: where states are wanted. The host does not wait for their copy to a GPU.

    Raises:
        UserError: there is no finished cache, or one of its files is missing or cut.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        self.folder, self.device = Path(folder), torch.device(device)
        self.manifest = STATES.open(self.folder)
        self.dim: int = self.manifest["dim"]
        self.max_tokens: int = self.manifest["made_with"]["text.max_tokens"]
        self._dtype: torch.dtype = getattr(torch, self.manifest["made_with"]["dtype"])
        self._distinct = Distinct(self.folder / PROMPTS, STATES)
        self._shards: dict[str, Shard] = {}

    def check(self, wanted: Mapping[str, Any]) -> None:
        """Raises UserError where the cache was not made from and with `wanted`: configuration key -> value."""
        check_made_with(self.folder, self.manifest, wanted)

    def __contains__(self, prompt: str) -> bool:
        return self._distinct.row(prompt) is not None

    def encode(self, prompts: list[str], *, instruct: bool = True) -> tuple[Tensor, Tensor]:
        """See `TextEncoder.encode`; states of padding are 0.

        Raises UserError for a prompt that was not encoded, and where a file turns out to be damaged.
        """
        states = [self._states(prompt) if instruct else self._null(prompt) for prompt in prompts]
        total, pinned = sum(map(len, states)), self.device.type == "cuda"
        # Tokens alone are copied to the device. There, padding takes the row of zeros behind them.
        tokens = torch.empty(total + 1, self.dim, dtype=self._dtype, pin_memory=pinned)
        index = torch.full((len(prompts), self.max_tokens), total, pin_memory=pinned)
        start = 0
        for row, some in zip(index, states, strict=True):
            tokens[start : start + len(some)] = some
            row[: len(some)] = torch.arange(start, start + len(some))
            start += len(some)
        tokens[total] = 0
        tokens, index = (x.to(self.device, non_blocking=True) for x in (tokens, index))
        return functional.embedding(index, tokens).float(), index < total

    def _states(self, prompt: str) -> Tensor:
        row = self._distinct.row(prompt)
        if row is None:
            raise UserError(f"{self.folder} has no states of the prompt {prompt!r}: it was made from other prompts")
        shard, place = divmod(row, SHARD_PROMPTS)
        return self._shard(shard_name(shard))[place]

    def _null(self, prompt: str) -> Tensor:
        if prompt:
            raise UserError(f"{self.folder} has states without instruction of the null prompt only, not of {prompt!r}")
        return self._shard(NULL)[0]

    def _shard(self, name: str) -> Shard:
        if name not in self._shards:
            shard = Shard(self.folder / name)
            if shard.metadata.get("sha256") != self.manifest["files"].get(name, {}).get("sha256"):
                raise UserError(f"{self.folder / name}: was encoded again since this run began; start it again")
            shard.check(self.dim, self._dtype, self.max_tokens)
            self._shards[name] = shard
        return self._shards[name]


class Shard:
    """A file of states, mapped into memory. Raises UserError where it is missing or not whole."""

    def __init__(self, path: Path) -> None:
        # The states [tokens of all, D] are read where they are used; prompt p has tokens offsets[p : p + 2] of them.
        self.metadata, (self.states, self.offsets) = STATES.read(path, "states", "offsets")
        if self.states.ndim != 2 or self.offsets.ndim != 1 or self.offsets.dtype != torch.int64:
            raise STATES.damaged(path, "its tensors have other shapes or types than states have")
        self.path = path
        self._starts: list[int] = self.offsets.tolist()
        if [*self._starts[:1], *self._starts[-1:]] != [0, len(self.states)] or (self.offsets.diff() < 0).any():
            raise STATES.damaged(path, "its offsets are not those of its states")

    def check(self, dim: int, dtype: torch.dtype, max_tokens: int) -> None:
        """Raises UserError where these are no states of such a kind."""
        longest = int(self.offsets.diff().max()) if len(self.offsets) > 1 else 0
        if self.states.shape[1] != dim or self.states.dtype != dtype or longest > max_tokens:
            raise STATES.damaged(self.path, "its states are not of the kind that the manifest tells")

    def __getitem__(self, prompt: int) -> Tensor:
        """Its states [tokens, D]."""
        if prompt + 1 >= len(self._starts):
            raise STATES.damaged(self.path, f"it has no prompt {prompt}")
        return self.states[self._starts[prompt] : self._starts[prompt + 1]]


class Distinct:
    """A cache's distinct prompts, found by their text. Raises UserError where their file is damaged."""

    def __init__(self, file: Path, kind: Kind) -> None:
        table = map_table(file)
        if table.column_names != ["prompt", "order"] or not pa.types.is_integer(table.schema.field("order").type):
            raise kind.damaged(file, "it has other columns than prompts and their order")
        self._prompts, self._order = table["prompt"], table["order"].to_numpy()
        strings = pa.types.is_string(self._prompts.type) or pa.types.is_large_string(self._prompts.type)
        holes = self._prompts.null_count or table["order"].null_count
        if not strings or holes or not _is_permutation(self._order):
            raise kind.damaged(file, "its order is none of its prompts")

    def row(self, prompt: str) -> int | None:
        """Where `prompt` is among them."""

        def text(row: int) -> str:
            return str(self._prompts[int(row)].as_py())

        place = bisect_left(self._order, prompt, key=text)
        found = place < len(self._order) and text(self._order[place]) == prompt
        return int(self._order[place]) if found else None


def _is_permutation(order: np.ndarray) -> bool:
    """Of [0, n). Takes a fifth of a second for ten million."""
    counts = np.zeros(len(order), bool)
    counts[order[(order >= 0) & (order < len(order))].astype(np.int64)] = True
    return bool(counts.all())


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"
