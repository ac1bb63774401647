from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zipfile
from pathlib import Path

import pytest

from tbcm.data import files
from tbcm.data.files import expand, find, shown, what_it_is
from tbcm.errors import UserError

KINDS = ".txt", ".csv"


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def names(path: Path | str, of: Path) -> list[str]:
    return [os.path.relpath(file, of) for file in find(path, KINDS, "file")]


def test_numbers_count_as_numbers(tmp_path: Path) -> None:
    make(tmp_path, "10.txt", "2.txt", "b1.txt", "1.txt", "b10a.txt", "b9b.txt", "01.txt", "x2/3.txt", "x10/1.txt")
    assert names(tmp_path / "*.txt", tmp_path) == [
        *("01.txt", "1.txt", "2.txt", "10.txt", "b1.txt", "b9b.txt", "b10a.txt")
    ]
    assert names(tmp_path / "x*" / "*.txt", tmp_path) == ["x2/3.txt", "x10/1.txt"]
    assert names(tmp_path / "**" / "3.txt", tmp_path) == ["x2/3.txt"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("p-{00..02}.txt", ["p-00.txt", "p-01.txt", "p-02.txt"]),
        ("p-{2..0}.txt", ["p-2.txt", "p-1.txt", "p-0.txt"]),
        ("{b,a}.txt", ["b.txt", "a.txt"]),
        ("{a,b}-{0..1}.txt", ["a-0.txt", "a-1.txt", "b-0.txt", "b-1.txt"]),
        ("[ab].txt", ["a.txt", "b.txt"]),
        ("?.txt", ["a.txt", "b.txt"]),
        ("[new] set/*.txt", ["[new] set/1.txt", "[new] set/2.txt"]),
        ("{0..1}.txt", ["{0..1}.txt"]),
        ("st*r.txt", ["st*r.txt"]),
    ],
)
def test_patterns_and_names_that_look_like_them(tmp_path: Path, pattern: str, found: list[str]) -> None:
    """What is there as it is written is meant so."""
    make(tmp_path, *found, "star.txt", "n set/3.txt", ".hidden.txt")
    assert names(tmp_path / pattern, tmp_path) == found


def test_members_of_a_range_are_named_even_where_they_are_missing(tmp_path: Path) -> None:
    make(tmp_path, "p-0.txt", "p-2.txt")
    assert names(tmp_path / "p-{0..2}.txt", tmp_path) == ["p-0.txt", "p-1.txt", "p-2.txt"]
    make(tmp_path, "[a] b/0.txt", "c1/a.txt")
    assert names(tmp_path / "[a] b" / "{0..1}.txt", tmp_path) == ["[a] b/0.txt", "[a] b/1.txt"]
    assert names(tmp_path / "c{1..2}" / "a.txt", tmp_path) == ["c1/a.txt", "c2/a.txt"]
    assert names(tmp_path / "c{1..2}" / "*.txt", tmp_path) == ["c1/a.txt", "c2/*.txt"]


def test_a_folder_that_looks_like_a_range_lists_nothing(tmp_path: Path) -> None:
    """Members of a range are expected, even where they are missing; of a folder's name there is one member."""
    (tmp_path / "{0..2}").mkdir()
    assert expand(tmp_path / "{0..2}" / "missing.txt") == []
    assert expand(tmp_path / "{0..2}" / "{3..4}.txt") == [tmp_path / "{0..2}" / f"{i}.txt" for i in (3, 4)]


def test_a_folder_is_its_own_files_of_one_kind(tmp_path: Path) -> None:
    make(tmp_path / "a", "2.txt", "1.TXT", "notes.md", ".1.txt", "below/3.txt")
    assert names(tmp_path / "a", tmp_path / "a") == ["1.TXT", "2.txt"]
    make(tmp_path / "b", "1.txt", "1.csv")
    with pytest.raises(UserError, match=r"b: holds \.csv and \.txt; say which, such as .*\*\.csv"):
        names(tmp_path / "b", tmp_path)
    make(tmp_path / "c", "notes.md")
    with pytest.raises(UserError, match=r"c: no file in this folder \(\.txt, \.csv\)"):
        names(tmp_path / "c", tmp_path)


def test_the_training_part_of_a_hugging_face_layout(tmp_path: Path) -> None:
    make(tmp_path / "hub", "data/train-00000-of-00002.csv", "data/train-00001-of-00002.csv", "data/test-00000.csv")
    assert names(tmp_path / "hub", tmp_path / "hub") == [f"data/train-0000{i}-of-00002.csv" for i in range(2)]
    make(tmp_path / "split", "train/1.txt", "test/2.txt", "README.md")
    assert names(tmp_path / "split", tmp_path / "split") == ["train/1.txt"]
    make(tmp_path / "words", "training.txt", "trains.txt")
    assert names(tmp_path / "words", tmp_path / "words") == ["training.txt", "trains.txt"]


@pytest.mark.parametrize(
    "path", ["nowhere.txt", "nowhere/*.txt", "a" * 300, "a/" * 3000, "a\0b", "\ud800", "~nobody/x", ""]
)
def test_paths_of_any_kind(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make(tmp_path / "empty", "README").parent / "empty")
    with pytest.raises(UserError) as caught:
        find(path, KINDS, "file")
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()


def test_a_range_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_FILES", 100)
    assert len(expand(tmp_path / "{1..100}.txt")) == 100
    with pytest.raises(UserError, match="names more than 100 files"):
        expand(tmp_path / "{0..99999999999}{0..99}.txt")


def test_links_are_followed(tmp_path: Path) -> None:
    make(tmp_path / "a", "1.txt")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "2.txt").symlink_to(tmp_path / "a" / "1.txt")
    assert names(tmp_path / "b", tmp_path / "b") == ["1.txt", "2.txt"]


def test_what_is_no_data() -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a", "b")
    for content, word in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (archive.getvalue(), "zip"),
        (gzip.compress(b"a", mtime=0), "gzip"),
        (bz2.compress(b"a"), "bzip2"),
        (lzma.compress(b"a"), "xz"),
        (b"\xef\xbb\xbf\n <!DOCTYPE HTML>\n", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
        (b"PAR1abc", "Parquet"),
    ):
        assert word in str(what_it_is(content))
    for content in (b"", b"a red panda", b"<3 a heart", b"version 2", "桜".encode()):
        assert what_it_is(content) is None


def test_values_are_shown_in_short() -> None:
    assert shown("a\n") == r"'a\n'" and shown(5) == "5"
    assert len(shown("x" * 10**6)) < 90 and len(shown([1] * 10**6)) < 90 and len(shown({"a": "b" * 10**4})) < 90
