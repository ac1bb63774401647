from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tbcm.data.decoding import decode_file
from tbcm.errors import UserError


def decode(path: Path, side: int) -> Tensor:
    return decode_file(path, (side, side))


@pytest.mark.parametrize("turned", [False, True])
def test_the_centre_is_kept(tmp_path: Path, turned: bool) -> None:
    columns = np.arange(48, dtype=np.uint8)[None].repeat(16, 0) * 5  # 48 x 16: each column is a shade of its own
    Image.fromarray(columns.T if turned else columns).save(tmp_path / "a.png")

    def shades(size: int) -> list[int]:
        image = decode(tmp_path / "a.png", size)[0]
        return (image[:, 0] if turned else image[0]).tolist()

    assert shades(16) == [5 * i for i in range(16, 32)]
    assert shades(4) == pytest.approx([5 * i for i in (17.5, 21.5, 25.5, 29.5)], abs=1)


def test_shrinking_averages_instead_of_picking_pixels(tmp_path: Path) -> None:
    board = ((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "a.png")
    assert (decode(tmp_path / "a.png", 8).float() - 127.5).abs().max() < 8


def test_transparency_lies_on_white_in_every_mode(tmp_path: Path) -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:, :2] = (255, 0, 0, 255)
    rgba[:, 2:] = (0, 0, 0, 51)  # a fifth of black
    picture = Image.fromarray(rgba)
    picture.save(tmp_path / "rgba.png")
    assert decode(tmp_path / "rgba.png", 4)[:, 0].tolist() == [[255, 255, 204, 204], [0, 0, 204, 204], [0, 0, 204, 204]]
    picture.convert("LA").save(tmp_path / "la.png")
    assert decode(tmp_path / "la.png", 4)[:, 0, 3].tolist() == [204] * 3
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "p.png", transparency=0)
    decoded = decode(tmp_path / "p.png", 4)
    assert decoded[:, 0, 0].tolist() == [255] * 3 and decoded[:, 1, 1].tolist() == [9, 8, 7]


def test_grey_and_cmyk_become_rgb_and_a_camera_s_rotation_is_applied(tmp_path: Path) -> None:
    Image.new("L", (4, 4), 70).save(tmp_path / "grey.png")
    assert decode(tmp_path / "grey.png", 4).unique().tolist() == [70]
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    assert (decode(tmp_path / "cmyk.jpg", 4)[:, 0, 0].float() - torch.tensor([255.0, 0, 0])).abs().max() < 6
    turned = Image.new("RGB", (4, 4), "black")
    turned.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    assert decode(tmp_path / "turned.png", 4)[0].nonzero().tolist() == [[0, 3]]


def test_more_than_eight_bits_are_refused_and_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 30_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match=r"deep\.png: its pixels have more than 8 bits"):
        decode(tmp_path / "deep.png", 4)
