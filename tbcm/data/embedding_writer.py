"""Writing what `tbcm.data.embeddings` reads: many writers, each of which may be killed at any time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

import tbcm
from tbcm.data import sharded
from tbcm.data.captions import PromptSource, open_prompts
from tbcm.data.embeddings import NULL, PROMPTS, SHARD_PROMPTS, STATES, Shard, shard_name
from tbcm.data.sharded import MANIFEST, key_of, key_of_settings
from tbcm.runtime.files import atomic_path, write_json


class CacheWriter:
    """Fills `folder`. A shard knows which prompts it was made from and with what, so one that is there and whole is
    never made again, not even where prompts were added to the end of their file.

    Args:
        made_with: all that decides the states, configuration key -> value, and "dtype", which they are kept in.
    """

    kind = STATES

    def __init__(self, folder: Path, made_with: Mapping[str, Any]) -> None:
        self.folder, self.made_with = folder, dict(made_with)
        self.dtype: torch.dtype = getattr(torch, self.made_with["dtype"])

    def begin(self, source: PromptSource) -> None:
        """Writes the list of prompts. Rank 0 does, before any other touches the folder.

        Raises UserError where the folder holds a finished cache that was made with other settings.
        """
        self.kind.begin(self.folder, self.made_with)
        distinct = pc.unique(source.texts)
        table = pa.table({"prompt": distinct, "order": pc.sort_indices(distinct)})
        with atomic_path(self.folder / PROMPTS) as part, pa.ipc.new_file(str(part), table.schema) as writer:
            writer.write_table(table)

    @cached_property
    def names(self) -> list[str]:
        """Every file of states."""
        return [NULL, *map(shard_name, range(-(-len(self._distinct) // SHARD_PROMPTS)))]

    def prompts(self, name: str) -> list[str]:
        if name == NULL:
            return [""]
        start = int(name.removeprefix("shard-").removesuffix(".safetensors")) * SHARD_PROMPTS
        return self._distinct[start : start + SHARD_PROMPTS]

    def is_whole(self, name: str, *, verify: bool = False) -> bool:
        """Whether a file is there, of these prompts and settings and in its full length; and, to `verify`, unchanged
        to the last bit."""
        return self.kind.is_whole(self.folder / name, self._key(name), verify=verify)

    def write(self, name: str, encoded: Iterable[tuple[Tensor, Tensor]]) -> None:
        """A file from the states and masks of its prompts, batch by batch as an encoder returns them."""
        kept = [_without_padding(embeds, mask, self.dtype) for embeds, mask in encoded]
        states, lengths = (torch.cat(parts) for parts in zip(*kept, strict=True))
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        tensors = {"states": states, "offsets": offsets}
        sharded.write(self.folder / name, self._key(name), tensors, beside=self.folder / PROMPTS)

    def finish(self, source: PromptSource) -> dict[str, Any]:
        """Writes the manifest and returns it. Rank 0 does, when all files are there."""
        self.remove_others()
        files = {PROMPTS: {"prompts": len(self._distinct)}} | {name: self._facts_of(name) for name in self.names}
        manifest = {
            "format": self.kind.format,
            "tbcm": tbcm.__version__,
            "made_from": {"data.prompts": source.digest()},
            "made_with": self.made_with,
            "prompts": len(source),
            "distinct_prompts": len(self._distinct),
            **self._facts(),
            "files": {name: {"bytes": (self.folder / name).stat().st_size, **file} for name, file in files.items()},
        }
        write_json(self.folder / MANIFEST, manifest)
        return manifest

    def _facts(self) -> dict[str, Any]:
        """What else the manifest says of the whole."""
        longest, shards = self.made_with["text.max_tokens"], [Shard(self.folder / name) for name in self.names]
        return {
            "prompts_that_fill_max_tokens": sum(int((s.offsets.diff() == longest).sum()) for s in shards[1:]),
            "dim": shards[0].states.shape[1],
        }

    def _facts_of(self, name: str) -> dict[str, Any]:
        """What it says of a file."""
        s = Shard(self.folder / name)
        return {"prompts": len(s.offsets) - 1, "tokens": len(s.states), "sha256": s.metadata["sha256"]}

    def remove_others(self) -> None:
        """Shards of a longer list of prompts."""
        for name in {path.name for path in self.folder.glob("shard-*.safetensors")} - set(self.names):
            (self.folder / name).unlink()

    @cached_property
    def _distinct(self) -> PromptSource:
        return open_prompts(self.folder / PROMPTS)

    def _key(self, name: str) -> str:
        return key_of(self.kind.format, key_of_settings(self.made_with), self.prompts(name))


def _without_padding(embeds: Tensor, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The states [tokens, D] of P prompts, end to end on the CPU, and how many each has [P].

    Raises ValueError for masks with holes: reading puts tokens in front and padding behind.
    """
    lengths = mask.sum(1)
    if not torch.equal(mask, torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]):
        raise ValueError("an encoder's padding is to follow its tokens")
    return embeds[mask].to(dtype).cpu(), lengths.cpu()
