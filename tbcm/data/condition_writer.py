"""Writing what `tbcm.data.conditions` reads: many writers, each of which may be killed at any time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tbcm.config.resolution import Size, shown_size
from tbcm.data import sharded
from tbcm.data.conditions import CONDITIONS, GIVEN, WITHOUT, rows
from tbcm.data.embedding_writer import CacheWriter
from tbcm.data.embeddings import NULL, PROMPTS
from tbcm.errors import UserError
from tbcm.method.types import Condition

Rows = list[dict[str, Tensor]]


class Encoders(Protocol):
    """As `tbcm.models.families.text.RecordedConditions`."""

    @property
    def example(self) -> str: ...

    def null_prompt(self, size: Size) -> Condition | None: ...

    def __call__(self, prompts: list[str], size: Size) -> Condition: ...


class ConditionWriter(CacheWriter):
    """Fills a folder with conditions for images of `sizes`. (See `CacheWriter`.)"""

    kind = CONDITIONS

    def encode(self, text: Encoders, name: str, batch: int, sizes: Sequence[Size]) -> None:
        """Writes a file of the prompts' conditions, or of the unconditional branch's and static values."""
        if name == NULL:
            nulls = {size: text.null_prompt(size) for size in sizes}
            found = {size: [] if null is None else rows(null) for size, null in nulls.items()}
            self._write(name, _by_size(found), self._statics(text, nulls))
            return
        prompts = self.prompts(name)
        found = {size: [] for size in sizes}
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            first = rows(text(some, sizes[0]))
            found[sizes[0]] += first
            for size in sizes[1:]:
                found[size] += rows(text(some, size)) if self._sized(text, sizes) else first
        self._write(name, _by_size(found), {})

    def _facts(self) -> dict[str, Any]:
        return {}

    def _facts_of(self, name: str) -> dict[str, Any]:
        metadata, _ = CONDITIONS.read_all(self.folder / name)
        return {"prompts": len(self.prompts(name)), "sha256": metadata["sha256"]}

    def _statics(self, text: Encoders, nulls: dict[Size, Condition | None]) -> dict[str, Tensor]:
        found = {}
        for whose, size, value in _conditions(text, nulls):
            where, plain = f"{whose}/{shown_size(size)}", {}
            for name, part in value.static.items():
                if isinstance(part, Tensor):
                    found[f"static/{where}/{name}"] = part.detach().cpu().contiguous()
                else:
                    plain[name] = part
            try:
                content = json.dumps(plain).encode()
            except (TypeError, ValueError) as error:
                raise UserError(f"text.cache: this teacher's network is given what cannot be stored: {error}") from None
            found[f"plain/{where}"] = torch.tensor(list(content), dtype=torch.uint8)
        return found

    def _sized(self, text: Encoders, sizes: Sequence[Size]) -> bool:
        """Whether a prompt's tensors differ between sizes."""
        if not hasattr(self, "_differs"):
            prompt = self.prompts(self.names[1])[:1]
            first, *others = (text(prompt, size).tensors for size in sizes)
            self._differs = any(not torch.equal(other[k], first[k]) for other in others for k in first)
        return self._differs

    def _write(self, name: str, found: dict[str, list[Tensor]], more: dict[str, Tensor]) -> None:
        tensors = dict(more)
        for key, values in found.items():
            tensors[f"values/{key}"] = torch.cat([self._stored(value).flatten() for value in values])
            tensors[f"shapes/{key}"] = torch.tensor([value.shape for value in values], dtype=torch.int64)
        ordered = {key: tensors[key] for key in sorted(tensors)}
        sharded.write(self.folder / name, self._key(name), ordered, beside=self.folder / PROMPTS)

    def _stored(self, value: Tensor) -> Tensor:
        """Text states in the dtype asked for; small numbers such as sizes, and masks, as they are."""
        states = value.is_floating_point() and value.numel() > 64 and value.dtype != torch.float64
        return value.to(self.dtype if states else value.dtype).cpu()


def _conditions(text: Encoders, nulls: dict[Size, Condition | None]) -> list[tuple[str, Size, Condition]]:
    """Of any prompt, and of none."""
    found = [(GIVEN, size, text([text.example], size)) for size in nulls]
    return found + [(WITHOUT, size, null) for size, null in nulls.items() if null is not None]


def _by_size(found: dict[Size, Rows]) -> dict[str, list[Tensor]]:
    """All prompts' values by "SIZE/ARGUMENT"; of other sizes than the first what differs from it."""
    first, *others = found
    values: dict[str, list[Tensor]] = {}
    for name in found[first][0] if found[first] else {}:
        values[f"{shown_size(first)}/{name}"] = mine = [row[name] for row in found[first]]
        for size in others:
            theirs = [row[name] for row in found[size]]
            if not all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True)):
                values[f"{shown_size(size)}/{name}"] = theirs
    return values
