"""Rows and their places, and one line about whatever is wrong."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tbcm.data import texts
from tbcm.data.tables import KINDS, read_columns
from tbcm.errors import UserError


def rows(path: Path, *columns: str) -> list[tuple[int, Any]]:
    return [(where, values[0] if len(values) == 1 else values) for where, values in read_columns(path, columns)]


def refused(path: Path, content: bytes | str, *columns: str) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        rows(path, *(columns or ("prompt",)))
    text = str(caught.value)
    assert str(path) in text and "\n" not in text
    return text.replace(str(path), "FILE")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        (
            "a.csv",
            "prompt\na red cat, sitting on a mat, oil painting\n",
            "line 2: has 3 fields, the header 1: quote fields",
        ),
        (
            "a.csv",
            'id,prompt\n1,"a\nb\nc"\n\n2\n',
            "line 6: has 1 fields, the header 2: quote fields that contain commas",
        ),
        ("a.csv", 'id,prompt\n1,"a\nb"\n2,"c\nd",e\n', "line 4: has 3 fields, the header 2"),
        ("a.tsv", "prompt\turl\na cat\n", "line 2: has 1 fields, the header 2: quote fields that contain tabs"),
        ("a.csv", 'prompt\na\n"b\nc\n', "line 3: cannot be read as .csv: unexpected end of data"),
        ("a.csv", 'prompt\n"a"b\n', "line 2: cannot be read as .csv: ',' expected after '\"'"),
        ("a.csv", "prompt,prompt\na,b\n", "line 1: the header has 'prompt' 2 times"),
        ("a.csv", ",\na,b\n", "no column 'prompt'; it has '', ''"),
        ("a.csv", "prompt\na\nb\0c\n", "line 3: has a NUL byte after 1 characters"),
        ("a.txt", "a cat\na d\0g\n", "line 2: has a NUL byte after 3 characters; it is damaged or not text"),
        ("a.txt", "a cat\n".encode("utf-16-le"), "line 1: looks like UTF-16 without its mark"),
        ("a.jsonl", '{"prompt": "a"}\n'.encode("utf-16-be"), "line 1: looks like UTF-16 without its mark"),
        ("a.txt", "桜の木 cat\n".encode("utf-16-le"), "FILE"),
        (
            "a.txt",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n",
            "is a Git LFS pointer, not the file",
        ),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "is a Git LFS pointer"),
        ("a.csv", "<!doctype html><html></html>", "is a web page, such as a failed download leaves: download it again"),
        ("a.parquet", "<html></html>", "is a web page"),
        (
            "a.csv",
            gzip.compress(b"prompt\na\n", mtime=0),
            "is compressed with gzip: unpack it, or end the name of a text file in .gz",
        ),
        ("a.csv.gz", "prompt\na\n", "is not compressed, though its name ends in .gz: rename it"),
        ("a.csv.gz", gzip.compress(b"prompt\na\n", mtime=0)[:-9], "cut or damaged"),
        ("a.txt.gz", gzip.compress("café".encode("latin-1"), mtime=0), "line 1, byte 3 (0xe9) is not UTF-8"),
        ("a.txt", "café".encode("utf-16")[:-1], "is not UTF-16, as its first bytes say"),
        ("a.jsonl", "[" * 100_000, "line 1: JSON that cannot be read"),
        ("a.jsonl", '{"prompt": ' + "9" * 5000 + "}", "line 1: JSON that cannot be read"),
        ("a.txt", b"PAR1 and more", "is a Parquet file"),
    ],
)
def test_what_is_malformed(tmp_path: Path, name: str, content: bytes | str, complaint: str) -> None:
    text = refused(tmp_path / name, content)
    assert complaint in text and len(text) < 300


def test_a_zip_archive_under_another_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a.csv", "prompt\na\n")
    assert "is a zip archive: unpack it" in refused(tmp_path / "a.csv", (tmp_path / "a.zip").read_bytes())


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_encodings_with_a_mark_and_line_ends_of_every_kind(tmp_path: Path, coding: str, ends: str) -> None:
    (tmp_path / "a.csv").write_bytes(ends.join(["id,prompt", "1,café 桜", '2,"a, b"']).encode(coding))
    assert rows(tmp_path / "a.csv", "prompt") == [(2, "café 桜"), (3, "a, b")]
    (tmp_path / "b.txt").write_bytes(ends.join(["café", "桜"]).encode(coding))
    assert [(n, text.strip()) for n, text in rows(tmp_path / "b.txt", "")] == [(1, "café"), (2, "桜")]


def test_a_row_is_at_the_line_where_it_begins(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\nid,prompt\n1,"two\nlines"\n\n2,plain\n')
    assert rows(tmp_path / "a.csv", "prompt") == [(3, "two\nlines"), (6, "plain")]


def test_a_huge_field_that_nobody_asked_for_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"image,prompt\n{'A' * 3_000_000},a cat\n,a dog\n")
    assert rows(tmp_path / "a.csv", "prompt") == [(2, "a cat"), (3, "a dog")]


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MAX_LINE", 1000)
    assert "line 2: has more than 1,000 characters" in refused(tmp_path / "a.txt", "a\n" + "b" * 1001)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    words = ["a cat", "café"]
    if kind == ".parquet":
        pq.write_table(pa.table({"id": [1, 2], "prompt": words}), tmp_path / "a.parquet")
    else:
        plain = kind.removesuffix(".gz")
        text = {
            ".txt": "a cat\ncafé",
            ".jsonl": "".join(json.dumps({"prompt": word}) + "\n" for word in words),
            ".csv": "id,prompt\n1,a cat\n2,café\n",
            ".tsv": "id\tprompt\n1\ta cat\n2\tcafé\n",
        }[plain]
        content = text.encode()
        (tmp_path / f"a{kind}").write_bytes(gzip.compress(content) if kind != plain else content)
    assert [value.strip() for _, value in rows(tmp_path / f"a{kind}", "prompt")] == words


def test_a_dot_in_a_column_goes_into_what_it_holds(tmp_path: Path) -> None:
    inner = [{"prompt": "a", "deep": {"er": "b"}}, {"prompt": None, "deep": None}]
    pq.write_table(pa.table({"json": inner, "plain.name": ["x", "y"]}), tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet", "json.prompt") == [(1, "a"), (2, None)]
    assert rows(tmp_path / "a.parquet", "json.deep.er") == [(1, "b"), (2, None)]
    assert rows(tmp_path / "a.parquet", "plain.name") == [(1, "x"), (2, "y")]
    pq.write_table(pa.table({"json": [json.dumps(row) for row in inner]}), tmp_path / "b.parquet")
    assert rows(tmp_path / "b.parquet", "json.deep.er") == [(1, "b"), (2, None)]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"json": row}) for row in inner))
    assert rows(tmp_path / "c.jsonl", "json.prompt") == [(1, "a"), (2, None)]
    (tmp_path / "d.csv").write_text('json\n"{""prompt"": ""a""}"\n')
    assert rows(tmp_path / "d.csv", "json.prompt") == [(2, "a")]
    ((_, error),) = rows(tmp_path / "d.csv", "json.caption")
    assert isinstance(error, UserError) and "line 2: json: no column 'caption'; it has 'prompt'" in str(error)
    assert "no column 'yaml.prompt'; it has 'json'" in refused(
        tmp_path / "d.csv", (tmp_path / "d.csv").read_bytes(), "yaml.prompt"
    )


def test_several_columns_in_one_pass_and_one_twice(tmp_path: Path) -> None:
    pq.write_table(pa.table({"b": ["x"], "a": ["y"]}), tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet", "a", "b", "a") == [(1, ["y", "x", "y"])]
    two = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], ["a", "a"])
    pq.write_table(two, tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet: has 2 columns 'a'"):
        rows(tmp_path / "b.parquet", "a")
