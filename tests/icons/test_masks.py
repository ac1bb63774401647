from __future__ import annotations

import numpy as np
import pytest

from tbcm.icons.masks import FRAME, SIZE, distinct, render, style_of


def test_a_drawing_is_centred_and_as_long_as_the_frame() -> None:
    mask = render({"body": '<rect x="1" y="3" width="4" height="2"/>', "width": 24, "height": 12})
    assert mask is not None and mask.shape == (SIZE, SIZE) and mask.dtype == np.uint8
    rows, columns = (np.flatnonzero(mask.max(axis=axis) > 127) for axis in (1, 0))
    assert columns[-1] - columns[0] + 1 == pytest.approx(FRAME, abs=2)
    assert rows[-1] - rows[0] + 1 == pytest.approx(FRAME / 2, abs=2)
    assert rows[0] + rows[-1] == pytest.approx(SIZE - 1, abs=1) and columns[0] + columns[-1] == pytest.approx(
        SIZE - 1, abs=1
    )


def test_current_colour_counts_and_an_empty_drawing_is_none() -> None:
    assert render({"body": '<circle cx="8" cy="8" r="4" fill="currentColor"/>'}) is not None
    assert render({"body": "<g/>"}) is None


@pytest.mark.parametrize(
    ("body", "style"),
    [
        ('<circle cx="12" cy="12" r="10"/>', "solid"),
        ('<circle cx="12" cy="12" r="10" fill="none" stroke="#000" stroke-width="2"/>', "outline"),
        ('<path d="M2 12h20M12 2v20" fill="none" stroke="#000" stroke-width="2"/>', "outline"),  # encloses no hole
        ('<path fill-rule="evenodd" d="M2 2h20v20h-20zM10 10h4v4h-4z"/>', "solid"),
    ],
)
def test_style(body: str, style: str) -> None:
    mask = render({"body": body, "width": 24, "height": 24})
    assert mask is not None and style_of(mask) == style


def test_of_drawings_that_are_alike_the_first_is_kept() -> None:
    masks = np.zeros((4, 64, 64), dtype=np.uint8)
    masks[0, :32], masks[1, :33], masks[2, :40], masks[3] = 255, 255, 255, 255  # a row is 1/64 of the tile
    assert distinct(masks) == [0, 2, 3]
