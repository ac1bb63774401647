"""Whatever is malformed ends in one line: 5,000 damaged files, and 1,000 paths. `make fuzz` tries more."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzzing import check, fuzz, targets

from tbcm.data.embeddings import CachedEncoder
from tbcm.data.images import open_images
from tbcm.data.latents import PrecomputedLatents
from tbcm.data.prompts import load_prompts

INPUTS, PATHS = 160, 250  # of each reader


def test_damaged_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")
    tried = refused = 0
    readers = targets(tmp_path)
    for target in readers:
        refused += fuzz(target, tmp_path / "files", INPUTS, seed=0)
        tried += INPUTS
    assert tried >= 5_000 and tried / 2 < refused < tried  # neither is everything good, nor everything bad
    print(f"{tried:,} damaged files of {len(readers)} readers, {refused:,} refused")


PIECES = (
    *("a", "a" * 300, "/", "//", ".", "~nobody", "\0", "\n", "\x1b[2J", "*", "**", "?", "[", "[a", "]"),
    *("{0..3}", "{0..99999999999999999999}", "{a,b}", "{", "}", ".txt", ".csv", ".tar", ".parquet", ".jsonl.gz", " "),
    *(
        "#",
        "桜",
        "é",
        "🐼",
        "\udcff",
        "\ud800",
        "$HOME",
        "%s",
        "\\",
        "'",
        '"',
        ":",
        "=",
        "-",
        "\u202e",
        "\u2028",
        "C:\\",
    ),
)


@pytest.mark.parametrize(
    "read",
    [
        lambda path: load_prompts(path, folder="clean"),
        lambda path: open_images(path),
        lambda path: CachedEncoder(path),
        lambda path: PrecomputedLatents(path),
    ],
    ids=["prompts", "images", "states", "latents"],
)
def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[object], object]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "a").mkdir(parents=True)
    for number in range(PATHS):
        source = random.Random(number)
        path = "".join(source.choices(PIECES, k=source.choice((1, 2, 3, 5, 9, 40)))).replace("..", ".").lstrip("/")
        assert check(lambda _, path=path: read(path), tmp_path, repr(path), "")  # type: ignore[misc,arg-type]
