"""Images and prompts as people have them: side by side, in Hugging Face's layouts, in Parquet, in several shards."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tbcm.data.images import open_images
from tbcm.data.prompts import load_prompts
from tbcm.errors import UserError


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def found(path: Path | str, column: str = "text") -> list[tuple[int, Any]]:
    """The shade of each image, and its captions."""
    data = open_images(str(path), column)
    shades = [round(float(x)) for x in (data.images(range(len(data)), (4, 4))[:, 0, 0, 0] + 1) * 127.5]
    return list(zip(shades, data.captions.all_texts(0, len(data)), strict=True))  # type: ignore[attr-defined]


# Images


def test_images_beside_their_captions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files: dict[str, bytes | str] = {f"{i}.png": png(i) for i in (1, 2, 10)} | {
        f"{i}.txt": f"n {i}" for i in (1, 2, 10)
    }
    files |= {"sub/22.05.png": png(22), "sub/22.05.txt": "dots", "sub/22.06.png": png(23), "sub/22.06.txt": "more dots"}
    files |= {"j.png": png(5), "j.json": '{"text": ["a", "b"], "n": 1}', "README.md": "x", ".hidden/9.png": png(9)}
    with caplog.at_level(logging.INFO, "tbcm"):
        assert found(write(tmp_path, files)) == [
            *((1, "n 1"), (2, "n 2"), (10, "n 10"), (5, ["a", "b"])),
            *((22, "dots"), (23, "more dots")),
        ]
    assert "passed over: 1 .md (first" in caplog.text


def test_hugging_face_image_folder(tmp_path: Path) -> None:
    rows = "\n".join(json.dumps({"file_name": f"{i}.png", "text": f"n {i}"}) for i in range(3))
    for split in ("train", "test"):
        write(tmp_path, {f"{split}/{i}.png": png(i) for i in range(3)} | {f"{split}/metadata.jsonl": rows})
    assert found(tmp_path) == [(i, f"n {i}") for i in range(3)]
    write(tmp_path / "csv", {"train/1.png": png(1), "train/metadata.csv": 'file_name,text\n1.png,"a, b"\n'})
    assert found(tmp_path / "csv") == [(1, "a, b")]
    (tmp_path / "csv" / "train" / "metadata.csv").write_text("file_name,text\n1.png,a, b\n")
    with pytest.raises(UserError, match=r"metadata\.csv, line 2: has 3 fields, the header 2: quote fields"):
        found(tmp_path / "csv")


@pytest.mark.parametrize("kind", ["struct", "bytes", "path"])
def test_parquet_with_images(tmp_path: Path, kind: str) -> None:
    def value(i: int) -> Any:
        if kind == "bytes":
            return png(i)
        return {"bytes": png(i) if kind == "struct" else None, "path": f"{i}.png"}

    write(tmp_path, {f"data/{i}.png": png(i) for i in range(30)} if kind == "path" else {"data/x": ""})
    for shard in range(3):
        rows = [
            {"image": value(i), "text": f"n {i}", "all": ["a", f"b {i}"]} for i in range(10 * shard, 10 * shard + 10)
        ]
        pq.write_table(
            pa.Table.from_pylist(rows), tmp_path / f"data/train-0000{shard}-of-00003.parquet", row_group_size=4
        )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data/test-00000-of-00001.parquet")
    assert found(tmp_path) == [(i, f"n {i}") for i in range(30)]
    assert found(tmp_path / "data" / "train-0000{1..2}-of-00003.parquet", "all")[3] == (13, ["a", "b 13"])
    data = open_images(str(tmp_path))
    assert [round(float(x)) for x in (data.images([29, 0, 13, 29], (4, 4))[:, 0, 0, 0] + 1) * 127.5] == [29, 0, 13, 29]


def test_parquet_without_one_column_of_images(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "url": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: has no column of images .*it has text: string, url: string"):
        found(tmp_path)


def shard(path: Path, files: dict[str, bytes | str], links: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            data = content if isinstance(content, bytes) else content.encode()
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.LNKTYPE, target
            tar.addfile(member)
    return path


def test_names_with_dots_in_a_shard_are_not_lost_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A sample ends at the first dot, as in webdataset: what that loses is bad, told with a remedy, and counted."""
    good: dict[str, bytes | str] = {f"{i}.png": png(i) for i in range(40)} | {f"{i}.txt": f"n {i}" for i in range(40)}
    path = shard(
        tmp_path / "a.tar", good | {"b/22.05.png": png(1), "b/22.05.txt": "lost", "3.seg.png": png(1), "4.cls": "7"}
    )
    with pytest.raises(UserError, match=r"b/22\.05\.png: has dots before its ending, .* replace them by _"):
        open_images(str(path))
    with caplog.at_level(logging.INFO, "tbcm"):
        assert len(open_images(str(path), max_bad_share=0.05)) == 40
    assert "1 of 41 samples are bad and skipped: dots in the name: 1 (such as" in caplog.text
    assert "passed over: 2 .png (first " in caplog.text and "1 .cls" in caplog.text and "1 .txt" in caplog.text
    only = shard(tmp_path / "only.tar", {"22.05.png": png(1), "22.05.txt": "a", "22.06.png": png(1), "22.06.txt": "b"})
    with pytest.raises(UserError, match=r"2 of 2 samples are bad.*dots in the name: 2"):
        open_images(str(only), max_bad_share=0.5)


def test_links_and_sparse_files_in_a_shard_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = shard(tmp_path / "a.tar", {"1.png": png(1), "1.txt": "n 1", "._1.png": b"mac"}, {"2.png": "1.png"})
    with caplog.at_level(logging.INFO, "tbcm"):
        assert found(path) == [(1, "n 1")]
    assert "1 link or device (first" in caplog.text and "1 hidden file (first" in caplog.text
    with (tmp_path / "9.png").open("wb") as file:
        file.truncate(2**20)
        file.seek(2**19)
        file.write(b"x")
    os.system(f"cd {tmp_path} && tar --sparse -cf sparse.tar 9.png")
    with pytest.raises(UserError, match=r"sparse\.tar: holds no samples; .* 1 sparse file \(first .*9\.png"):
        found(tmp_path / "sparse.tar")


@pytest.mark.parametrize("pad", [0, 10240])
def test_joined_shards_are_an_error_that_says_how_to_mend_them(tmp_path: Path, pad: int) -> None:
    one, two = (shard(tmp_path / f"{i}.tar", {f"{i}.png": png(i), f"{i}.txt": f"n {i}"}) for i in range(2))
    (tmp_path / "joined.tar").write_bytes(one.read_bytes() + bytes(pad) + two.read_bytes())
    with pytest.raises(
        UserError, match=r"joined\.tar: has data after its end mark at byte 2,048, .* tar --concatenate"
    ):
        open_images(str(tmp_path / "joined.tar"))
    os.system(f"cd {tmp_path} && cp 0.tar mended.tar && tar --concatenate -f mended.tar 1.tar")
    assert found(tmp_path / "mended.tar") == [(0, "n 0"), (1, "n 1")]


def test_captions_of_a_shard_may_be_lists_or_deep_in_its_json(tmp_path: Path) -> None:
    meta = json.dumps({"captions": ["a", "b"], "deep": {"er": "c"}, "prompt": "d"})
    path = shard(tmp_path / "a.tar", {"1.png": png(1), "1.json": meta})
    for column, expected in (("captions", ["a", "b"]), ("deep.er", "c"), ("json.prompt", "d"), ("json.deep.er", "c")):
        assert found(path, column) == [(1, expected)]


def test_shards_compressed_or_something_else(tmp_path: Path) -> None:
    whole = shard(tmp_path / "a.tar", {"1.png": png(1), "1.txt": "n"}).read_bytes()
    for name, content, word in (
        ("b.tar.gz", gzip.compress(whole, mtime=0), "compressed with gzip: unpack it"),
        ("c.tar", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        ("d.tar", b"<!DOCTYPE html>" + b" " * 600, "web page"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=word):
            open_images(str(tmp_path / name))


# Prompts


def load(path: Path | str, home: Path, column: str = "prompt") -> list[str]:
    return list(load_prompts(path, column, folder=home / "clean"))


def parts(home: Path, kind: str) -> Path:
    """Eleven shards of two prompts each."""
    (home / "parts").mkdir()
    for i in range(11):
        path = home / "parts" / f"part-{i}.{kind}"
        words = [f"prompt {2 * i}", f"prompt {2 * i + 1}"]
        if kind == "parquet":
            pq.write_table(pa.table({"prompt": words}), path)
        else:
            text = "".join(json.dumps({"prompt": word}) + "\n" for word in words).encode()
            path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    return home / "parts"


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz"])
def test_prompts_in_several_files(tmp_path: Path, kind: str) -> None:
    folder, expected = parts(tmp_path, kind), [f"prompt {i}" for i in range(22)]
    assert load(folder, tmp_path) == load(folder / f"*.{kind}", tmp_path) == expected
    assert load(folder / ("part-{0..10}." + kind), tmp_path) == expected
    assert load(folder / ("part-{10,2}." + kind), tmp_path) == [expected[i] for i in (20, 21, 4, 5)]
    with pytest.raises(UserError, match=r"part-11\.\S+: no such prompt file"):
        load(folder / ("part-{0..11}." + kind), tmp_path)


def test_every_file_counts_for_whether_prompts_are_read_again(tmp_path: Path) -> None:
    folder = parts(tmp_path, "jsonl")
    before = load_prompts(folder, folder=tmp_path / "clean").digest()
    (folder / "part-7.jsonl").write_text('{"prompt": "prompt 14"}\n{"prompt": "prompt 99"}\n')
    os.utime(folder / "part-7.jsonl", ns=(1, 1))
    after = load_prompts(folder, folder=tmp_path / "clean")
    assert after[15] == "prompt 99" and after.digest() != before
    (folder / "part-11.jsonl").write_text('{"prompt": "more"}\n')
    assert load(folder, tmp_path)[22:] == ["more"]
    (folder / "part-3.jsonl").rename(folder / "part-12.jsonl")
    assert load(folder, tmp_path)[-2:] == ["prompt 6", "prompt 7"]


def test_an_error_names_the_file_of_several(tmp_path: Path) -> None:
    folder = parts(tmp_path, "jsonl")
    (folder / "part-7.jsonl").write_text('{"prompt": "a"}\n{"prompt": 5}\n')
    with pytest.raises(UserError, match=r"part-7\.jsonl, line 2: the prompt is 5; give text"):
        load(folder, tmp_path)


def test_duplicates_over_files_are_told_with_their_places(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "p", {"1.txt": "a\nb\n", "2.txt": "c\n\na\n"})
    with caplog.at_level(logging.INFO, "tbcm"):
        assert load(tmp_path / "p", tmp_path) == ["a", "b", "c", "a"]
    assert "4 prompts in 2 files, 1 blank ones dropped, duplicates among them: 1 (" in caplog.text
    assert "2.txt, line 3)" in caplog.text


@pytest.mark.parametrize("stem", ["x" * 240, "桜" * 80, "a b#c'd\"e", "$(rm)", "\udcff\udcfe", "-rf", "a\nb"])
def test_files_with_names_of_any_kind(tmp_path: Path, stem: str) -> None:
    path = tmp_path / f"{stem}.txt"
    path.write_text("a cat\n")
    assert load(path, tmp_path) == ["a cat"]
    path.write_text("a\0cat\n")
    with pytest.raises(UserError) as caught:
        load(path, tmp_path)
    assert str(caught.value).isprintable()
