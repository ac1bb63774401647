"""Prompts and captions in Arrow memory, one or several to an entry, and the order in which training takes them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from tbcm.errors import UserError
from tbcm.runtime.seeding import stream_bytes

TEXTS = pa.large_list(pa.large_string())
_PER_BATCH = 65_536


class PromptSource(Sequence[str]):
    """Entries in their order, each of one text or, as with images that have several captions, of more.

    As a sequence it holds the first text of each. Args: `entries`, an Arrow array of strings or of lists of them.
    """

    def __init__(self, entries: pa.Array | pa.ChunkedArray) -> None:
        self._entries = entries
        self._lists = pa.types.is_large_list(entries.type)
        if self._lists and len(self.texts) == len(entries):  # one each
            self._entries, self._lists = self.texts, False

    @classmethod
    def of(cls, path: Path | str, texts: Iterable[str] | Iterable[list[str]]) -> PromptSource:
        """`texts`, which were read from `path`. Raises UserError where one cannot be encoded as UTF-8."""
        found: list[Any] = list(texts)
        try:
            return cls(as_lists(found) if found and isinstance(found[0], list) else pa.array(found, pa.large_string()))
        except UnicodeEncodeError as error:
            raise UserError(f"{path}: cannot be kept as UTF-8: {error}") from None

    @property
    def entries(self) -> pa.Array | pa.ChunkedArray:
        return self._entries

    @property
    def texts(self) -> pa.Array | pa.ChunkedArray:
        """Every text of every entry, end to end."""
        if not self._lists:
            return self._entries
        chunked = isinstance(self._entries, pa.ChunkedArray)
        chunks = self._entries.chunks if chunked else [self._entries]
        return pa.chunked_array([chunk.flatten() for chunk in chunks], type=pa.large_string())

    def all_texts(self, start: int, stop: int) -> list[Any]:
        """Entries as they are: a text, or a list where there are several."""
        found = self._entries[start:stop].to_pylist()
        return [entry[0] if len(entry) == 1 else entry for entry in found] if self._lists else found

    def drawn(self, index: int, epoch: int, seed: int) -> str:
        """The text that entry `index` has in this epoch: a function of these three and of nothing else."""
        entry = self._entries[index].as_py()
        if not self._lists:
            return str(entry)
        drawn = int.from_bytes(stream_bytes(seed, epoch, f"caption/{index}", 8), "little")
        return str(entry[drawn % len(entry)])

    def digest(self) -> str:
        """Tells these texts, and their order, from others. Takes a second for a million."""
        hashed = hashlib.sha256()
        for start in range(0, len(self), _PER_BATCH):
            for entry in self.all_texts(start, start + _PER_BATCH):
                if isinstance(entry, list):
                    hashed.update(b"[%d] " % len(entry))
                for text in entry if isinstance(entry, list) else [entry]:
                    data = text.encode()
                    hashed.update(b"%d " % len(data) + data)
        return hashed.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _PER_BATCH):
            yield from self[start : start + _PER_BATCH]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            found = self._entries[index].to_pylist()
            return [entry[0] for entry in found] if self._lists else found
        entry = self._entries[index].as_py()
        return entry[0] if self._lists else entry


def as_lists(entries: Sequence[str | list[str]]) -> pa.LargeListArray:
    """An array of `TEXTS`."""
    lengths = [len(entry) if isinstance(entry, list) else 1 for entry in entries]
    texts = itertools.chain.from_iterable(entry if isinstance(entry, list) else (entry,) for entry in entries)
    return pa.LargeListArray.from_arrays(np.cumsum([0, *lengths], dtype=np.int64), pa.array(texts, pa.large_string()))


def digest(prompts: Iterable[str]) -> str:
    """See `PromptSource.digest`."""
    return (prompts if isinstance(prompts, PromptSource) else PromptSource.of("prompts", prompts)).digest()


def drawn(source: Sequence[str], index: int, epoch: int, seed: int) -> str:
    """See `PromptSource.drawn`; a plain sequence has one text an entry."""
    return source.drawn(index, epoch, seed) if isinstance(source, PromptSource) else source[index]


def open_prompts(file: Path) -> PromptSource:
    """The first column of an Arrow file, mapped into memory. Raises UserError where it is missing or damaged."""
    table = map_table(file)
    entries = table.column(0) if table.num_columns else pa.nulls(0)
    kinds = (pa.large_string(), pa.string(), TEXTS)
    if entries.type not in kinds or entries.null_count or PromptSource(entries).texts.null_count:
        raise UserError(f"{file}: damaged (not a column of texts); remove it to have it made again")
    if entries.type == TEXTS and any((np.diff(chunk.offsets.to_numpy()) < 1).any() for chunk in entries.chunks):
        raise UserError(f"{file}: damaged (an entry without text); remove it to have it made again")
    return PromptSource(entries)


def map_table(file: Path) -> pa.Table:
    """An Arrow file, mapped into memory and looked through once: an offset that is wrong would crash Python later.

    Raises UserError where it is missing or damaged.
    """
    try:
        with pa.memory_map(str(file)) as mapped:
            table = pa.ipc.open_file(mapped).read_all()
        table.validate(full=True)
    except FileNotFoundError:
        raise UserError(f"{file}: not seen by this process: all nodes must share the folder it is in") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file}: damaged ({error}); remove it to have it made again") from None
    return table


def batch_indices(num_prompts: int, prompts_per_step: int, step: int, seed: int) -> list[int]:
    """The prompts of global batch `step` (0-based): `prompts_per_step` indices into [0, num_prompts).

    The epochs' shuffled orders (`prompt_order`) are laid end to end and cut into batches, so nothing is dropped and a
    batch may run over the end of an epoch, or over several where prompts are few. A function of its arguments alone:
    a run can be resumed at any step, and the number of ranks does not matter.
    """
    position, end = step * prompts_per_step, (step + 1) * prompts_per_step
    indices: list[int] = []
    while position < end:
        epoch, offset = divmod(position, num_prompts)
        piece = prompt_order(num_prompts, seed, epoch)[offset : offset + end - position].tolist()
        indices += piece
        position += len(piece)
    return indices


def batch_epochs(num_prompts: int, prompts_per_step: int, step: int) -> list[int]:
    """The epoch of each prompt of `batch_indices`."""
    return [position // num_prompts for position in range(step * prompts_per_step, (step + 1) * prompts_per_step)]


@lru_cache(maxsize=2)  # a step touches one epoch, or two at its end; shuffling a million prompts takes 20 ms
def prompt_order(num_prompts: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the prompts in one epoch: a permutation of [0, num_prompts), int64, read-only."""
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(num_prompts)
    order.flags.writeable = False
    return order
