"""Entries of several texts, of which each epoch has one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tbcm.data.captions import PromptSource, batch_epochs, batch_indices, digest, drawn, open_prompts
from tbcm.data.prompts import load_prompts
from tbcm.errors import UserError

LISTS = [["a cat", " a tabby ", None, ""], "a dog", ["a sun"], ["x", "y", "z"]]
CLEAN = [["a cat", "a tabby"], ["a dog"], ["a sun"], ["x", "y", "z"]]


def write(folder: Path, kind: str) -> Path:
    if kind == "jsonl":
        (folder / "p.jsonl").write_text("\n".join(json.dumps({"prompt": entry}) for entry in [*LISTS, [], [None]]))
    else:
        lists = [entry if isinstance(entry, list) else [entry] for entry in LISTS]
        pq.write_table(pa.table({"prompt": [*lists, [], None]}), folder / "p.parquet")
    return folder / f"p.{kind}"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_lists_of_texts(tmp_path: Path, kind: str) -> None:
    source = load_prompts(write(tmp_path, kind), folder=tmp_path / "clean")
    assert len(source) == 4 and source.all_texts(0, 4) == [["a cat", "a tabby"], "a dog", "a sun", ["x", "y", "z"]]
    assert list(source) == ["a cat", "a dog", "a sun", "x"] and source[-1] == "x" and source[1:3] == ["a dog", "a sun"]
    assert source.texts.to_pylist() == [text for entry in CLEAN for text in entry]


def test_an_epoch_draws_one_text_by_seed_epoch_and_index_alone() -> None:
    source = PromptSource.of("here", [["a", "b", "c"]] * 600)
    counts = Counter(source.drawn(i, 3, seed=1) for i in range(600))
    assert set(counts) == set("abc") and min(counts.values()) > 150
    draws = [[source.drawn(i, epoch, seed) for i in range(600)] for epoch, seed in ((3, 1), (4, 1), (3, 2))]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert 140 < sum(a == b for a, b in zip(draws[one], draws[other], strict=True)) < 260  # a third
    assert draws[0] == [source.drawn(i, 3, seed=1) for i in reversed(range(600))][::-1]
    assert drawn(["plain"], 0, 5, 5) == "plain" and PromptSource.of("here", ["one"]).drawn(0, 9, 9) == "one"


@pytest.mark.parametrize(("count", "per_step"), [(10, 3), (3, 10), (4, 4)])
def test_epochs_of_a_batch(count: int, per_step: int) -> None:
    seen: dict[int, list[int]] = {}
    for step in range(3 * count):
        batch = zip(batch_indices(count, per_step, step, 0), batch_epochs(count, per_step, step), strict=True)
        for index, epoch in batch:
            seen.setdefault(epoch, []).append(index)
    assert sorted(seen) == list(range(3 * per_step))
    assert all(sorted(indices) == list(range(count)) for indices in seen.values())


def test_the_digest_tells_lists_apart() -> None:
    kinds = [[["a", "b"], ["c"]], [["a"], ["b", "c"]], [["a"], ["b"], ["c"]], [["a", "b", "c"]], [["b", "a"], ["c"]]]
    assert len({PromptSource.of("here", kind).digest() for kind in kinds}) == len(kinds)
    assert PromptSource.of("here", [["a"], ["b"]]).digest() == digest(["a", "b"]) == "7dc2784f68637e81"


def test_damaged_files_of_texts(tmp_path: Path) -> None:
    for number, table in enumerate(
        (
            pa.table({"n": [1, 2]}),
            pa.table({}),
            pa.table({"prompt": ["a", None]}),
            pa.table({"prompt": pa.array([["a"], []], pa.large_list(pa.large_string()))}),
            pa.table({"prompt": pa.array([["a"], [None]], pa.large_list(pa.large_string()))}),
        )
    ):
        with pa.OSFile(str(tmp_path / f"{number}.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        with pytest.raises(UserError, match=rf"{number}\.arrow: damaged"):
            open_prompts(tmp_path / f"{number}.arrow")
