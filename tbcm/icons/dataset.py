"""Drawings of icons as alpha masks, rendered from the SVG sets that npm carries.

    python -m tbcm.icons.dataset OUT [--packages DIR]

writes `drawings.webp`, a lossless atlas (64 columns of 64 px tiles, white on black) with one drawing of a concept a
tile, `drawings.json`, which names set, icon, concept and style of every tile, and `shapes.webp` with `shapes.json`:
drawings of no concept (`camera-off`), which only the autoencoder sees.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tbcm.config.paths import path_argument
from tbcm.errors import UserError, command
from tbcm.icons.concepts import concept_of, is_compound, named_style, plain_name
from tbcm.icons.masks import SIZE, Mask, distinct, render, style_of
from tbcm.icons.packages import UNSEEN_SETS, VERSIONS, IconSet, fetch, read_set, tarball
from tbcm.runtime.files import atomic_path, write_json

COLUMNS = 64  # tiles in a row of an atlas
FEWEST = 5  # drawings of a concept in a style, below which they are left out
MOST = 32  # drawings of a concept in a style, above which sets that repeat themselves give fewer
SHAPES = 0.4  # share of the compound icons that is rendered


@dataclass(frozen=True)
class Drawing:
    """What a mask shows, and which icon of which set it is."""

    icon_set: str
    icon: str
    concept: str
    style: str

    @property
    def key(self) -> str:
        return f"{self.icon_set}:{self.icon}"

    @property
    def unseen(self) -> bool:
        """Whether the drawing belongs to a set that nothing is trained on."""
        return self.icon_set in UNSEEN_SETS


@dataclass(frozen=True)
class Drawings:
    """Masks [n, 64, 64] uint8 (255 = foreground) with one entry each, in the same order."""

    masks: Tensor
    entries: list[Drawing]

    def __len__(self) -> int:
        return len(self.entries)

    def select(self, unseen: bool) -> Drawings:
        keep = [i for i, entry in enumerate(self.entries) if entry.unseen == unseen]
        return Drawings(self.masks[keep], [self.entries[i] for i in keep])


def chance(*words: str) -> float:
    """A number in [0, 1) that depends on the words alone: neither the order nor the number of icons moves a split."""
    return int.from_bytes(hashlib.sha256("\n".join(words).encode()).digest()[:4], "big") / 2**32


def write_atlas(path: Path, masks: Sequence[Mask]) -> None:
    """Masks, row by row, as one lossless WebP image."""
    sheet = np.zeros((-(-len(masks) // COLUMNS) * SIZE, COLUMNS * SIZE), dtype=np.uint8)
    for i, mask in enumerate(masks):
        row, column = divmod(i, COLUMNS)
        sheet[row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE] = mask
    with atomic_path(path) as temporary:
        Image.fromarray(sheet).convert("RGB").save(temporary, format="WEBP", lossless=True, quality=100, method=4)


def read_atlas(path: Path, count: int) -> Tensor:
    """The first `count` tiles of an atlas, [count, 64, 64] uint8."""
    if not path.is_file():
        raise UserError(f"icons: {path} is missing; make it with `python -m tbcm.icons.dataset {path.parent}`")
    with Image.open(path) as image:
        sheet = torch.from_numpy(np.array(image.convert("L")))  # [rows * 64, columns * 64]
    tiles = sheet.unfold(0, SIZE, SIZE).unfold(1, SIZE, SIZE).flatten(0, 1)  # [tiles, 64, 64]
    return tiles[:count].contiguous()


def _read_table(path: Path) -> dict[str, object]:
    if not path.is_file():
        raise UserError(f"icons: {path} is missing; make it with `python -m tbcm.icons.dataset {path.parent}`")
    table: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    return table


def load_drawings(folder: str | Path) -> Drawings:
    """What `build` wrote of the concepts. Raises UserError where a file is missing."""
    folder = Path(folder)
    rows = _read_table(folder / "drawings.json")["drawings"]
    entries = [Drawing(*row) for row in rows]  # type: ignore[attr-defined]
    return Drawings(read_atlas(folder / "drawings.webp", len(entries)), entries)


def write_drawings(drawings: Drawings, folder: Path) -> None:
    """Writes `drawings.webp` and `drawings.json`, which `load_drawings` reads."""
    write_atlas(folder / "drawings.webp", list(drawings.masks.numpy()))
    rows = [list(astuple(entry)) for entry in drawings.entries]
    write_json(folder / "drawings.json", {"size": SIZE, "columns": COLUMNS, "drawings": rows})


def load_shapes(folder: str | Path) -> Tensor:
    """Masks [n, 64, 64] uint8 of drawings of no concept. Raises UserError where a file is missing."""
    folder = Path(folder)
    count = _read_table(folder / "shapes.json")["count"]
    return read_atlas(folder / "shapes.webp", count)  # type: ignore[arg-type]


Found = list[tuple[Drawing, Mask]]


def drawings_of(icons: IconSet) -> Found:
    """The drawings of concepts in one set, without those whose name tells another style than their mask."""
    found: Found = []
    for name, icon in sorted(icons.icons.items()):
        plain = plain_name(name)
        concept = plain and concept_of(plain)
        if concept and (mask := render(icon)) is not None:
            style = style_of(mask)
            if named_style(name) in (None, style):
                found.append((Drawing(icons.prefix, name, concept, style), mask))
    return found


def shapes_of(icons: IconSet) -> list[Mask]:
    """Masks of a share of the set's compound icons; none of a set that nothing is trained on."""
    if icons.prefix in UNSEEN_SETS:
        return []
    names = (name for name in sorted(icons.icons) if chance(icons.prefix, name) < SHAPES)
    compound = (name for name in names if (plain := plain_name(name)) and is_compound(plain))
    return [mask for name in compound if (mask := render(icons.icons[name])) is not None]


def left_out() -> set[str]:
    """Icons (`set:icon`) that do not show what they are called; found by looking at all of them."""
    return set((resources.files("tbcm.icons") / "left_out.txt").read_text(encoding="utf-8").split())


def without_doubles(found: Found, wrong: set[str]) -> Found:
    """Of drawings of one concept that are alike, keeps one: that of an unseen set if there is one, so that nothing
    like it is trained on. None of `wrong` and none alike."""

    def order(pair: tuple[Drawing, Mask]) -> tuple[bool, bool]:
        return pair[0].key not in wrong, not pair[0].unseen

    found = sorted(found, key=order)
    kept = [found[i] for i in distinct(np.stack([mask for _, mask in found]))]
    return [pair for pair in kept if pair[0].key not in wrong]


def without_rare(found: Found) -> Found:
    """Without styles of a concept that have fewer than `FEWEST` drawings to train on."""
    count = Counter((drawing.concept, drawing.style) for drawing, _ in found if not drawing.unseen)
    return [pair for pair in found if count[pair[0].concept, pair[0].style] >= FEWEST]


def without_many(found: Found) -> Found:
    """At most `MOST` drawings of a concept in a style: one of every set, then a second of every set, and so on."""
    per_set: Counter[tuple[str, str, str]] = Counter()
    turns: dict[tuple[str, str], list[tuple[int, float, str]]] = defaultdict(list)
    for drawing in sorted((drawing for drawing, _ in found), key=lambda drawing: chance(drawing.key)):
        group = drawing.concept, drawing.style
        turns[group].append((per_set[drawing.icon_set, *group], chance(drawing.key), drawing.key))
        per_set[drawing.icon_set, *group] += 1
    kept = {key for some in turns.values() for _, _, key in sorted(some)[:MOST]}
    return [pair for pair in found if pair[0].key in kept]


def build(out: Path, packages: Path) -> tuple[int, int]:
    """Renders the sets under `packages` (a folder of npm tarballs) into `out`; returns how many drawings and shapes."""
    by_concept: dict[str, Found] = defaultdict(list)
    shapes: dict[bytes, Mask] = {}
    for prefix, version in VERSIONS.items():
        icons = read_set(packages / tarball(prefix, version))
        for drawing, mask in drawings_of(icons):
            by_concept[drawing.concept].append((drawing, mask))
        for mask in shapes_of(icons):
            shapes.setdefault(_coarse(mask), mask)
    wrong = left_out()
    distinct_ones = [pair for _, group in sorted(by_concept.items()) for pair in without_doubles(group, wrong)]
    found = without_many(without_rare(distinct_ones))
    masks = torch.from_numpy(np.stack([mask for _, mask in found]))
    write_drawings(Drawings(masks, [drawing for drawing, _ in found]), out)
    write_atlas(out / "shapes.webp", list(shapes.values()))
    write_json(out / "shapes.json", {"size": SIZE, "columns": COLUMNS, "count": len(shapes)})
    return len(found), len(shapes)


def _coarse(mask: NDArray[np.uint8]) -> bytes:
    return (mask[2::4, 2::4] // 64).tobytes()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tbcm.icons.dataset", description="Render the icons' masks.")
    parser.add_argument("out", type=path_argument, help="folder for the atlases and their tables")
    parser.add_argument(
        "--packages", type=path_argument, help="folder of npm tarballs; those missing are fetched by `npm pack`"
    )
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse()
    packages = arguments.packages or arguments.out / "packages"
    fetch(packages)
    drawings, shapes = build(arguments.out, packages)
    print(f"{drawings} drawings of concepts, {shapes} other shapes -> {arguments.out}")


if __name__ == "__main__":
    sys.exit(main())
