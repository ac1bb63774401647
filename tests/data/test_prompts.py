from __future__ import annotations

import csv
import json
import os
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tbcm.data import prompts as module
from tbcm.data.captions import PromptSource, batch_indices, prompt_order
from tbcm.data.prompts import load_prompts
from tbcm.errors import UserError

# Commas, quotes, a newline inside a prompt and characters of 2, 3 and 4 UTF-8 bytes.
AWKWARD = ['a "red" panda, sitting', "two\nlines", "café", "桜", "a 🐼", "plain"]


def write_jsonl(path: Path, prompts: list[str | None]) -> None:
    path.write_text("".join(json.dumps({"id": i, "prompt": p}) + "\n" for i, p in enumerate(prompts)), "utf-8")


def write_csv(path: Path, prompts: list[str | None]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "prompt"], *enumerate(prompts)])


def write_parquet(path: Path, prompts: list[str | None]) -> None:
    pq.write_table(pa.table({"id": list(range(len(prompts))), "prompt": prompts}), path)


Writer = Callable[[Path, list[str | None]], None]
TABLES = pytest.mark.parametrize(
    ("suffix", "write"), [("jsonl", write_jsonl), ("csv", write_csv), ("parquet", write_parquet)]
)


def load(path: Path, **options: str) -> PromptSource:
    return load_prompts(path, folder=path.parent / "clean", **options)


def message(path: Path, **options: str) -> str:
    with pytest.raises(UserError) as caught:
        load(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def test_text_file_keeps_order_and_duplicates_and_drops_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.TXT"
    path.write_bytes("\ufeffa cat\r\n\r\n  a dog \n \t\na cat\n桜".encode())
    source = load(path)
    assert list(source) == ["a cat", "a dog", "a cat", "桜"]
    assert (len(source), source[1], source[-1], source[1:3]) == (4, "a dog", "桜", ["a dog", "a cat"])


@TABLES
def test_tables_give_back_every_prompt(tmp_path: Path, suffix: str, write: Writer) -> None:
    path = tmp_path / f"prompts.{suffix}"
    write(path, [AWKWARD[0], None, "  ", *AWKWARD[1:]])
    assert list(load(path)) == AWKWARD


@TABLES
def test_a_missing_column_lists_those_there_are(tmp_path: Path, suffix: str, write: Writer) -> None:
    path = tmp_path / f"prompts.{suffix}"
    write(path, ["a cat"])
    text = message(path, column="caption")
    assert "no column 'caption'; it has 'id', 'prompt'" in text


def test_the_named_column_is_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,caption\nno,yes\n")
    assert list(load(path, column="caption")) == ["yes"]


@TABLES
def test_a_prompt_of_any_length_is_kept(tmp_path: Path, suffix: str, write: Writer) -> None:
    """It is the text encoder that cuts, at its limit of tokens."""
    path = tmp_path / f"prompts.{suffix}"
    write(path, ["a cat", "b" * 200_000])
    assert list(load(path)) == ["a cat", "b" * 200_000]


@TABLES
def test_nothing_but_blank_prompts_is_an_error(tmp_path: Path, suffix: str, write: Writer) -> None:
    path = tmp_path / f"prompts.{suffix}"
    write(path, [" ", None])
    assert "no prompts" in message(path)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv"])
def test_empty_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"prompts.{suffix}"
    path.write_bytes(b"")
    assert "no prompts" in message(path)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv"])
def test_not_utf8_names_line_and_byte(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"prompts.{suffix}"
    # The bad byte lies far beyond what a text reader decodes at once, so its offset is not relative to a chunk.
    good = b'{"prompt": "a cat"}\n' * 10_000 if suffix == "jsonl" else b"prompt\n" + b"a cat\n" * 9_999
    path.write_bytes(good + "café".encode("latin-1"))
    assert f"line 10001, byte {len(good) + 3:,} (0xe9) is not UTF-8; save the file as UTF-8" in message(path)


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    latin = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"], pa.binary()).buffers())
    pq.write_table(pa.table({"prompt": latin}), path)
    assert "UTF8" in message(path)


def test_missing_file_folder_and_unknown_extension(tmp_path: Path) -> None:
    assert "no such prompt file" in message(tmp_path / "none.txt")
    folder = tmp_path / "folder.txt"
    folder.mkdir()
    assert "no prompt file in this folder" in message(folder)
    (tmp_path / "prompts.docx").write_text("a cat")
    assert ".txt, .jsonl, .csv, .tsv, .parquet" in message(tmp_path / "prompts.docx")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{'prompt': 1}", "line 2: not JSON"),
        ('"a cat"', "line 2: give an object"),
        ('{"text": "a cat"}', "line 2: no column 'prompt'; it has 'text'"),
        ('{"prompt": 5}', "line 2: the prompt is 5; give text"),
        ('{"prompt": "\\ud800"}', "line 2: the prompt is '\\ud800', which is no Unicode text"),
    ],
)
def test_malformed_json_lines(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a cat"}\n' + line + "\n")
    assert complaint in message(path)


def test_malformed_csv_and_parquet(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text('prompt\na cat\n"never closed\n')
    assert "line 3: cannot be read as .csv" in message(path)
    path = tmp_path / "prompts.parquet"
    path.write_text("a cat\n")
    assert "cannot be read as .parquet" in message(path)
    pq.write_table(pa.table({"prompt": [1, 2]}), path)
    assert "row 1: the prompt is 1; give text" in message(path)


def test_loading_leaves_one_file_and_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("network used"))
    path = tmp_path / "prompts.parquet"
    write_parquet(path, ["a cat"])
    load(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clean", "prompts.parquet"]
    assert len(list((tmp_path / "clean").iterdir())) == 1


def test_a_file_is_read_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,caption\na cat,no\n")
    assert list(load(path)) == ["a cat"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_columns", lambda *_: pytest.fail("read again"))
        assert list(load(path)) == ["a cat"]
    assert list(load(path, column="caption")) == ["no"]
    path.write_text("prompt,caption\na dog,no\n")
    os.utime(path, ns=(1, 1))
    assert list(load(path)) == ["a dog"]


def test_prompts_are_mapped_and_not_held(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"a photo of cat number {i}\n" for i in range(150_000)))  # several Arrow batches
    before = pa.total_allocated_bytes()
    source = load(path)
    assert (len(source), source[149_999], source[-2]) == (150_000, "a photo of cat number 149999", source[149_998])
    assert source[65_535:65_537] == ["a photo of cat number 65535", "a photo of cat number 65536"]
    assert list(source) == path.read_text().splitlines()
    assert pa.total_allocated_bytes() - before < 10_000


def test_a_file_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n" * 70_000 + "b\0" * 3_000)
    assert "line 70001" in message(path)
    assert not list((tmp_path / "clean").iterdir())


def test_duplicates_and_blank_prompts_are_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(module.logger, "info", lambda message, *parts: told.append(message % parts))
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\na dog\na cat\n a cat \na sun\na dog\na cat\n")
    for _ in range(2):
        assert len(load(path)) == 7
    assert told == [f"{path}: 7 prompts, 1 blank ones dropped, duplicates among them: 4 (line 4, 5, 7, ...)"]


def test_a_rank_that_does_not_see_the_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n")
    elsewhere = tmp_path / "elsewhere.arrow"
    monkeypatch.setattr(module.distributed, "run_on_main", lambda _: elsewhere)
    with pytest.raises(UserError, match=r"elsewhere\.arrow: .* all nodes must share"):
        load(path)
    elsewhere.write_bytes(b"ARROW1\0\0 and then nothing")
    with pytest.raises(UserError, match=r"elsewhere\.arrow: damaged"):
        load(path)


def test_the_digest_tells_prompts_and_their_order_apart(tmp_path: Path) -> None:
    def digest(*prompts: str, suffix: str = "txt") -> str:
        path = tmp_path / f"prompts.{suffix}"
        path.write_text("\n".join(["prompt"] * (suffix == "csv") + list(prompts)))
        return load(path).digest()

    lists = [("ab", "c"), ("a", "bc"), ("c", "ab"), ("ab",), ("ab", "c", "c")]
    assert len({digest(*prompts) for prompts in lists}) == len(lists)
    assert digest("ab", "c", suffix="csv") == digest(" ab", "", "c")


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    orders = [tuple(prompt_order(50, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_order_does_not_depend_on_what_was_asked_before() -> None:
    first = batch_indices(1000, 8, step=300, seed=3)
    prompt_order.cache_clear()
    for step in (0, 5, 124, 300):
        last = batch_indices(1000, 8, step, seed=3)
    assert first == last


@pytest.mark.parametrize(("num_prompts", "prompts_per_step"), [(10, 3), (10, 10), (3, 10), (1, 4), (7, 1)])
def test_steps_walk_through_whole_epochs(num_prompts: int, prompts_per_step: int) -> None:
    batches = [batch_indices(num_prompts, prompts_per_step, step, seed=1) for step in range(num_prompts)]
    assert all(len(batch) == prompts_per_step for batch in batches)
    walked = [index for batch in batches for index in batch]  # exactly prompts_per_step epochs
    assert Counter(walked) == dict.fromkeys(range(num_prompts), prompts_per_step)
    epochs = [walked[i : i + num_prompts] for i in range(0, len(walked), num_prompts)]
    assert all(sorted(epoch) == list(range(num_prompts)) for epoch in epochs)


def test_a_batch_twice_as_large_is_two_batches() -> None:
    small = batch_indices(100, 8, 40, seed=0) + batch_indices(100, 8, 41, seed=0)
    assert batch_indices(100, 16, 20, seed=0) == small


def test_shuffling_is_uniform() -> None:
    """Which of 4 prompts comes first over 4,000 epochs: a chi-square of 3 degrees of freedom, 99.9 % below 16.3."""
    counts = Counter(batch_indices(4, 1, step=4 * epoch, seed=5)[0] for epoch in range(4000))
    assert sum((counts[i] - 1000) ** 2 / 1000 for i in range(4)) < 16.3


def test_a_million_prompts_cost_one_shuffle_an_epoch() -> None:
    prompt_order.cache_clear()
    for step in range(200):
        batch_indices(1_000_000, 32, step, seed=0)
    assert prompt_order.cache_info().misses == 1
