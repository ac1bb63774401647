from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tbcm.errors import UserError
from tbcm.inference.images import save_png, sheet, to_pil, to_uint8


def flat(count: int, size: int, colour: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.uint8).view(1, 3, 1, 1).expand(count, 3, size, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_to_uint8_maps_the_ends_and_clips(dtype: torch.dtype) -> None:
    images = torch.tensor([-1.0, 1.0, 0.0, -3.0, 7.0], dtype=dtype).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    assert to_uint8(images)[:, 0, 0, 0].tolist() == [0, 255, 128, 0, 255]


def test_to_uint8_gives_back_every_byte() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8(values / 127.5 - 1), values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_to_uint8_refuses_images_of_a_diverged_model(bad: float) -> None:
    images = torch.zeros(3, 3, 4, 4)
    images[1, 2, 0, 0] = bad
    with pytest.raises(UserError, match="1 of 3 images contain NaN or infinity"):
        to_uint8(images)


def test_png_holds_the_same_pixels_channels_last(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    path = tmp_path / "new" / "image.png"
    save_png(image, path)
    with Image.open(path) as picture:
        assert (picture.format, picture.size) == ("PNG", (7, 5))
        assert np.array_equal(np.array(picture), image.permute(1, 2, 0).numpy())
    assert list(path.parent.iterdir()) == [path]


def test_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="uint8"):
        save_png(torch.zeros(3, 4, 4), path)
    with pytest.raises(OSError, match="cannot write mode"):
        save_png(Image.new("HSV", (2, 2)), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def find(picture: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Bounding box (left, top, right, bottom) of a colour."""
    rows, columns = np.nonzero((np.array(picture) == colour).all(2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


RED, GREEN, BLUE = (250, 0, 0), (0, 250, 0), (0, 0, 250)


def test_sheet_places_rows_and_columns_without_smoothing() -> None:
    images = torch.cat([flat(1, 40, RED), flat(1, 40, GREEN)])
    picture = sheet([("first", images), ("second", flat(1, 40, BLUE))], ["one", "two"])
    red, green, blue = (find(picture, colour) for colour in (RED, GREEN, BLUE))
    for left, top, right, bottom in (red, green, blue):
        assert (right - left, bottom - top) == (120, 120)  # 40 px times the least whole factor that reaches 96
    assert (red[1], red[0]) == (green[1], blue[0])
    assert green[0] > red[2]
    assert blue[1] > red[3]


def test_sheet_does_not_shrink_or_enlarge_large_images() -> None:
    left, top, right, bottom = find(sheet([("", flat(1, 100, RED))]), RED)
    assert (right - left, bottom - top) == (100, 100)


def test_texts_stay_clear_of_images_and_edges() -> None:
    rows = [("a label of many words, too long for any margin " * 5, flat(3, 32, RED))] * 2
    captions = ["grinning-face-with-smiling-eyes-and-more", "x" * 300, "gypq " * 40]
    picture = sheet(rows, captions)
    plain = sheet([("", images) for _, images in rows])
    pixels = np.array(picture)
    assert (pixels == RED).all(2).sum() == (np.array(plain) == RED).all(2).sum()  # no letter covers a pixel
    frame = np.concatenate([pixels[:2].reshape(-1, 3), pixels[:, :2].reshape(-1, 3), pixels[:, -1]])
    assert (frame[(frame != 255).any(1)] == RED).all()
    left, top, _, _ = find(picture, RED)
    assert (pixels[:top, left:] != 255).any()  # captions
    assert (pixels[top:, :left] != 255).any()  # labels
    assert left < 200
    assert top < 80


def test_sheet_refuses_what_it_cannot_lay_out() -> None:
    with pytest.raises(ValueError, match="one size"):
        sheet([])
    with pytest.raises(ValueError, match="one size"):
        sheet([("a", flat(1, 32, RED)), ("b", flat(1, 64, RED))])
    with pytest.raises(ValueError, match="1 captions for 2 columns"):
        sheet([("a", flat(2, 32, RED))], ["one"])


def test_to_pil_is_rgb() -> None:
    assert to_pil(flat(1, 2, GREEN)[0]).getpixel((0, 0)) == GREEN
