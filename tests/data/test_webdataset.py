from __future__ import annotations

import gzip
import io
import json
import logging
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tbcm.data.decoding import decode_file
from tbcm.data.image_files import ImageFiles
from tbcm.data.images import open_images
from tbcm.data.webdataset import WebDataset
from tbcm.errors import UserError

Files = Sequence[tuple[str, bytes]]


def picture(value: int, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    shades = np.random.default_rng(value).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    shades[..., 0] = value
    Image.fromarray(shades).save(buffer, kind, lossless=True)
    return buffer.getvalue()


def write(path: Path, files: Files, kind: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sample(name: str, value: int, caption: str | None = None) -> Files:
    return [(f"{name}.png", picture(value)), (f"{name}.txt", (caption or f"number {value}").encode())]


def shards(folder: Path, count: int = 3) -> Path:
    """Samples 0 to 3 in shard 0, 10 to 13 in shard 1 ..., with red values and captions of these numbers."""
    for shard in range(count):
        files = [file for i in range(4) for file in sample(f"s{10 * shard + i:04d}", 10 * shard + i)]
        write(folder / f"{shard:05d}.tar", files)
    return folder


def numbers(data: Any, indices: Sequence[int]) -> list[int]:
    """The red values of images, after checking that they have the captions of these numbers."""
    found = [int(x) for x in (data.images(indices, (8, 8))[:, 0, 0, 0] + 1) * 127.5 + 0.5]
    assert [data.captions[i] for i in indices] == [f"number {n}" for n in found]
    return found


EVERY = [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]


@pytest.mark.parametrize("path", ["", "/", "/*.tar", "/0000?.tar", "/{00000..00002}.tar"])
def test_shards_in_any_order_however_they_are_named(tmp_path: Path, path: str) -> None:
    data = open_images(f"{shards(tmp_path)}{path}")
    assert isinstance(data, WebDataset) and len(data) == len(data.captions) == 12
    assert numbers(data, range(12)) == EVERY
    assert numbers(data, [11, 0, 5, 5, 2]) == [23, 0, 11, 11, 2]
    images = data.images([7], (8, 8))
    assert images.shape == (1, 3, 8, 8) and images.dtype == torch.float32
    file = tmp_path / "13.png"
    file.write_bytes(picture(13))
    torch.testing.assert_close(images[0], decode_file(file, (8, 8)) / 127.5 - 1)


def test_one_shard_a_range_of_some_and_a_path_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shards(tmp_path / "data").parent)
    assert numbers(open_images("data/00001.tar"), range(4)) == EVERY[4:8]
    assert numbers(open_images("data/{00001..00002}.tar"), range(8)) == EVERY[4:]
    assert numbers(open_images("d*a/*.tar"), range(12)) == EVERY


def test_a_folder_with_metadata_is_an_image_folder_even_beside_shards(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "a.png").write_bytes(picture(7))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "number 7"}))
    data = open_images(str(tmp_path))
    assert isinstance(data, ImageFiles) and numbers(data, [0]) == [7]


def test_names_kinds_and_other_members(tmp_path: Path) -> None:
    """Samples are told apart by folder and name up to the first dot; what is neither image nor caption is nothing."""
    long = "x" * 120 + "/" + "ü" * 90  # more than a plain header holds
    files = [
        ("a/1.webp", picture(1, "webp")),
        ("b/1.PNG", picture(2)),
        ("a/1.txt", b"number 1"),
        ("b/1.cls", b"7"),
        ("b/1.txt", b"\xef\xbb\xbf number 2 \n"),
        ("b/1.seg.png", b"not this one"),
        (f"{long}.png", picture(3)),
        (f"{long}.txt", b"number 3"),
        ("./v1.5/4.png", picture(4)),
        ("./v1.5/4.txt", b"number 4"),
        ("README", b"nothing"),
    ]
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        assert numbers(open_images(str(write(tmp_path / "a.tar", files, kind))), range(4)) == [1, 2, 3, 4]
    jpeg = [("1.jpg", picture(90, "jpeg")), ("1.txt", b"a"), ("2.jpeg", picture(90, "jpeg")), ("2.txt", b"b")]
    assert open_images(str(write(tmp_path / "jpeg.tar", jpeg))).images([0, 1], (8, 8)).shape == (2, 3, 8, 8)


def test_the_column_of_a_json_comes_before_a_txt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = [
        ("1.png", picture(1)),
        ("1.json", json.dumps({"text": "short", "long": "a long one"}).encode()),
        ("2.png", picture(2)),
        ("2.txt", b"from a txt"),
        ("2.json", b'{"text": "short"}'),
    ]
    path = str(write(tmp_path / "a.tar", files))
    with caplog.at_level(logging.INFO, "tbcm"):
        assert list(open_images(path, "long").captions) == ["a long one", "from a txt"]
    assert "2 images in 1 shards; captions: 1 of .json (long), 1 of .txt" in caplog.text
    assert list(open_images(path).captions) == ["short", "short"]


# Bad input


def message(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        open_images(str(path))
    text = str(caught.value)
    assert "\n" not in text and Path(path).name in text
    return text


IMAGE = ("k7.png", picture(0))


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ([IMAGE], "k7: has no caption; give it a .txt, or a .json with 'text'"),
        ([IMAGE, ("k7.json", b'{"caption": "a", "url": 1}')], "with 'text'; .json has 'caption', 'url'"),
        ([("k7.txt", b"a")], "k7: has no image; a sample has one .jpg, .jpeg, .png, .webp"),
        ([IMAGE, ("k7.jpg", b"a"), ("k7.txt", b"a")], "k7: has .jpg and .png; a sample has one"),
        ([IMAGE, ("k7.txt", b"a"), IMAGE], "k7.png: is there twice"),
        ([IMAGE, ("k7.txt", b" \n")], "k7.txt is ' \\n'; give text"),
        ([IMAGE, ("k7.txt", "café".encode("latin-1"))], "k7.txt: is not UTF-8 (byte 3)"),
        ([IMAGE, ("k7.json", b"{")], "k7.json: not JSON: "),
        ([IMAGE, ("k7.json", b"[1]")], "k7.json: give an object"),
        ([IMAGE, ("k7.json", b'{"text": 5}')], "k7.json: text is 5; give text"),
        ([IMAGE, ("k7.json", b'{"text": "\\ud800"}')], "k7.json: text is '\\ud800', which is no Unicode"),
        ([("README", b"a")], "holds no samples"),
        ([], "holds no samples"),
    ],
)
def test_a_bad_sample_is_named_with_its_shard(tmp_path: Path, files: Files, complaint: str) -> None:
    assert complaint in message(write(tmp_path / "00000.tar", files))


def test_missing_and_compressed_shards_and_what_is_none(tmp_path: Path) -> None:
    assert "no such folder of images, nor .tar" in message(tmp_path / "*.tar")
    assert "no such folder of images, nor .tar" in message(tmp_path / "a.tar")
    shards(tmp_path)
    with pytest.raises(UserError, match=r"00003\.tar: cannot be read: No such file"):
        open_images(f"{tmp_path}/{{00002..00003}}.tar")
    packed = tmp_path / "packed.tar.gz"
    packed.write_bytes(gzip.compress((tmp_path / "00000.tar").read_bytes()))
    assert "not a whole, uncompressed .tar" in message(packed)
    (tmp_path / "empty.tar").write_bytes(b"")
    assert "not a whole, uncompressed .tar" in message(tmp_path / "empty.tar")
    (tmp_path / "text.tar").write_text("this is text")
    assert "not a whole, uncompressed .tar" in message(tmp_path / "text.tar")


def test_a_shard_cut_or_damaged_anywhere_is_noticed(tmp_path: Path) -> None:
    path = shards(tmp_path, 1) / "00000.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        places = [member.offset for member in tar.getmembers()]
        end = tar.getmembers()[-1].offset_data + 512
    for cut in [*places, *(place + 100 for place in places), *(place + 600 for place in places), end]:
        path.write_bytes(whole[:cut])
        assert any(said in message(path) for said in ("not a whole", "damaged or cut after")), cut
    for place in places:
        path.write_bytes(whole[:place] + b"\xff" * 300 + whole[place + 300 :])
        assert any(said in message(path) for said in ("not a whole", "damaged or cut after")), place


def test_a_damaged_image_is_named_when_it_is_decoded(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [*sample("good", 5), ("bad.png", picture(6)[:200]), ("bad.txt", b"a")])
    data = open_images(str(path))
    assert numbers(data, [0]) == [5]
    with pytest.raises(UserError, match=r"a\.tar: bad\.png: cannot be decoded .*; replace it or take it out"):
        data.images([0, 1], (8, 8))
    path.unlink()
    with pytest.raises(UserError, match=r"a\.tar: good\.png: cannot be read: No such file"):
        data.images([0], (8, 8))
