from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny import tiny_config

from tbcm.data.images import ShippedIcons, open_images
from tbcm.errors import UserError
from tbcm.setup.images import build_images

COLOURS = {"red.png": (255, 0, 0), "sub/green.webp": (0, 255, 0), "blue.png": (0, 0, 255)}


def rows() -> list[dict[str, Any]]:
    return [{"file_name": name, "text": f" a {Path(name).stem}, flat "} for name in COLOURS]


def write_folder(folder: Path, entries: list[dict[str, Any]] | None = None) -> Path:
    """Flat images of the colours above, 20 x 12, and a metadata.jsonl."""
    for name, colour in COLOURS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 12), colour).save(folder / name, lossless=True)
    lines = [json.dumps(entry) for entry in (rows() if entries is None else entries)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def message(folder: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_images(str(folder), **options)
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    return text


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_images_and_captions_in_the_order_of_the_metadata(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path)
    if kind != "jsonl":
        (tmp_path / "metadata.jsonl").unlink()
    if kind == "csv":
        lines = ["file_name,text", *(f'{row["file_name"]},"{row["text"]}"' for row in rows())]
        (tmp_path / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows()), tmp_path / "metadata.parquet")
    data = open_images(str(tmp_path))
    assert list(data.captions) == ["a red, flat", "a green, flat", "a blue, flat"]
    assert len(data) == 3
    images = data.images([2, 0, 1, 2], (8, 8))
    assert images.shape == (4, 3, 8, 8) and images.dtype == torch.float32
    assert (images == images[:, :, :1, :1]).all()
    assert images[:, :, 0, 0].tolist() == [[-1, -1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]


def test_the_named_column_holds_the_captions(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [{"file_name": "red.png", "text": "no", "caption": "yes", "size": 3}])
    assert list(open_images(str(folder), "caption").captions) == ["yes"]


def test_missing_folder_metadata_and_file(tmp_path: Path) -> None:
    assert "no such folder" in message(tmp_path / "none")
    assert "holds no images: give .tar or .parquet files, a metadata.jsonl or metadata.csv" in message(tmp_path)
    folder = write_folder(tmp_path / "a", [*rows(), {"file_name": "gone.png", "text": "a cat"}])
    assert f"{folder / 'gone.png'} is missing" in message(folder)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"file_name": "red.png", "text": " "}, "line 4: text is ' '; give text or take it out"),
        ({"file_name": "red.png", "text": None}, "line 4: text is None"),
        ({"file_name": "red.png", "text": 5}, "line 4: text is 5"),
        ({"file_name": "", "text": "a cat"}, "line 4: file_name is ''"),
        ({"file_name": "red.png"}, "line 4: no column 'text'; it has 'file_name'"),
        ({"text": "a cat"}, "line 4: no column 'file_name'"),
        ({"file_name": "red.png", "text": "\ud800"}, "line 4: text is '\\ud800', which is no Unicode text"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, entry: dict[str, Any], complaint: str) -> None:
    assert complaint in message(write_folder(tmp_path, [*rows(), entry]))


def test_malformed_empty_and_other_encodings(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [])
    assert "has no rows" in message(folder)
    metadata = folder / "metadata.jsonl"
    metadata.write_text("{")
    assert "line 1: not JSON" in message(folder)
    metadata.write_bytes('{"file_name": "red.png", "text": "café"}\n'.encode("latin-1"))
    assert "line 1, byte 37 (0xe9) is not UTF-8" in message(folder)
    metadata.unlink()
    (folder / "metadata.csv").write_text("file_name,text\nred.png\n")  # a row cut short
    assert "line 2: has 1 fields, the header 2" in message(folder)
    (folder / "metadata.csv").write_text('file_name,text\nred.png,"never closed\n')
    assert "cannot be read" in message(folder)


def test_a_damaged_image_is_named_when_it_is_decoded(tmp_path: Path) -> None:
    data = open_images(str(write_folder(tmp_path)))
    whole = (tmp_path / "blue.png").read_bytes()
    for damaged in (b"", b"not an image", whole[: len(whole) // 2], whole[:20] + bytes(20) + whole[40:]):
        (tmp_path / "blue.png").write_bytes(damaged)
        assert data.images([0, 1], (8, 8)).shape == (2, 3, 8, 8)
        with pytest.raises(UserError, match=r"blue\.png: cannot be decoded .*; replace it"):
            data.images([0, 2, 1], (8, 8))


def test_the_shipped_icons_are_of_training_combinations_only() -> None:
    data = open_images("icons")
    assert isinstance(data, ShippedIcons)
    assets = Path(__file__).parents[2] / "tbcm" / "icons" / "assets"
    prompts = set((assets / "prompts.txt").read_text(encoding="utf-8").splitlines())
    assert len(data) == len(data.captions) > 10_000
    assert set(data.captions) <= prompts  # which hold no held-out combination
    index = list(data.captions).index("solid red camera on white")
    images = data.images([index, 0], (64, 64))
    assert images.shape == (2, 3, 64, 64) and images.min() >= -1 and images.max() <= 1
    corner, ink = images[0, :, 0, 0], images[0, 0] - images[0, 1:].mean(0)
    assert corner.min() > 0.9 and ink.max() > 0.8  # white, and somewhere far redder than green and blue
    for sizes in ([[64, 64], [64, 128]], 1024):
        with pytest.raises(UserError, match="the icons have 64 px: set resolution=64"):
            build_images(tiny_config(Path("unused"), resolution=sizes, data={"prompts": "unused", "images": "icons"}))
