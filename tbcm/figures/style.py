"""How figures look and how they are saved. Pages are laid out in pixels, so that images keep theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from tbcm.config.resolution import Size
from tbcm.errors import UserError
from tbcm.inference.images import to_pil
from tbcm.runtime.files import atomic_path, write_json

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise UserError("figures need matplotlib: pip install tbcm[figures]") from error

DPI = 150
WIDTH = 1200
"""Pixels of a page: 8 inches."""
LINE = 26
"""Pixels of a line of text."""

# Okabe and Ito's colours, which the colour-blind tell apart.
BLUE, RED, GREEN, ORANGE, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#777777"

_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "tbcm",  # the same figure is the same file
}
matplotlib.rcParams.update(_STYLE)


@dataclass(frozen=True)
class Drawing:
    """A finished figure, the numbers behind it (as JSON takes them) and a caption that states the chief ones."""

    figure: Figure
    numbers: dict[str, Any]
    caption: str


def page(height: int) -> Figure:
    """`WIDTH` by `height` pixels."""
    return Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")


def panel(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes whose frame is at these pixels, counted from the top left corner; its labels are outside them."""
    page_width, page_height = figure.get_size_inches() * DPI
    return figure.add_axes(
        (left / page_width, 1 - (top + height) / page_height, width / page_width, height / page_height)
    )


def write(figure: Figure, x: float, y: float, text: str, **options: Any) -> None:
    """Text at these pixels from the top left corner."""
    page_width, page_height = figure.get_size_inches() * DPI
    figure.text(x / page_width, 1 - y / page_height, text, **options)


def cell_size(width: float, columns: int, size: int, gap: int = 4) -> int:
    """How large images of `size` pixels are drawn, `columns` of them in `width`: a whole multiple of it, or smaller."""
    room = int((width - gap * (columns - 1)) // columns)
    return room if room < size else size * (room // size)


def cell_height(cell: int, size: Size) -> int:
    """Of images that are drawn `cell` pixels wide."""
    return round(cell * size[0] / size[1])


def mosaic(figure: Figure, left: int, top: int, rows: Sequence[Tensor], cell: int, gap: int = 4) -> int:
    """Rows of images [K, 3, H, W] uint8, each drawn `cell` pixels wide; returns where it ends, from the top.

    Enlarged images keep their pixels: they are not smoothed.
    """
    columns = max(len(row) for row in rows)
    height = cell_height(cell, (rows[0].shape[-2], rows[0].shape[-1]))
    canvas = np.full((len(rows) * (height + gap) - gap, columns * (cell + gap) - gap, 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            method = Image.Resampling.NEAREST if cell >= image.shape[-1] else Image.Resampling.LANCZOS
            pixels = np.asarray(to_pil(image).resize((cell, height), method))
            canvas[y * (height + gap) :, x * (cell + gap) :][:height, :cell] = pixels
    axes = panel(figure, left, top, canvas.shape[1], canvas.shape[0])
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    return top + canvas.shape[0]


def wrapped(text: str, width: float, lines: int = 2) -> str:
    """Text of the small size broken to about `width` pixels, cut to so many lines."""
    import textwrap

    return "\n".join(textwrap.wrap(text, max(6, int(width / 10.5)), max_lines=lines, placeholder=" …"))


def time_axis(axes: Axes, t_max: float, *, label: bool = True) -> None:
    """The x axis is the time from t_max (noise, left) to 0 (image), in multiples of pi."""
    ticks = [k * math.pi / 8 for k in range(5) if k * math.pi / 8 <= t_max + 1e-6]
    axes.set_xticks(ticks, [of_pi(tick) for tick in ticks])
    axes.set_xlim(t_max * 1.01, -0.01 * t_max)
    if label:
        axes.set_xlabel("time t, radians: noise on the left, image on the right")


def of_pi(t: float) -> str:
    """0, π/8, π/4, 3π/8, π/2 or 0.31π."""
    names = {0: "0", 1: "π/8", 2: "π/4", 3: "3π/8", 4: "π/2"}
    eighths = t / (math.pi / 8)
    return names[round(eighths)] if abs(eighths - round(eighths)) < 1e-4 else f"{t / math.pi:.2f}π"


def sequence(count: int) -> list[Any]:
    """Colours in an order, dark to light, that the colour-blind see too."""
    return [matplotlib.colormaps["viridis"](0.93 * i / max(1, count - 1)) for i in range(count)]


def legend_above(axes: Axes, columns: int) -> None:
    """Outside the data."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncol=columns, borderaxespad=0.2, handlelength=1.6)


def save(drawing: Drawing, name: str, out: Path) -> list[Path]:
    """NAME.png, NAME.svg, NAME.json (numbers and caption) and NAME.md in `out`, each whole or not at all."""
    for kind in ("png", "svg"):
        with atomic_path(out / f"{name}.{kind}") as part:
            metadata = {"Date": None} if kind == "svg" else None
            drawing.figure.savefig(part, format=kind, dpi=DPI, metadata=metadata)
    write_json(out / f"{name}.json", {"figure": name, **drawing.numbers, "caption": drawing.caption})
    with atomic_path(out / f"{name}.md") as part:
        part.write_text(f"![{name}]({name}.png)\n\n{drawing.caption}\n", encoding="utf-8")
    return [out / f"{name}.{kind}" for kind in ("png", "svg", "json", "md")]


def rounded(values: Tensor, digits: int = 4) -> list[Any]:
    """For JSON."""
    return np.round(values.double().cpu().numpy(), digits).tolist()
