"""Emoji images with captions, rendered from the SVG sets that npm carries.

    python -m tbcm.emoji.dataset OUT [--packages DIR]

writes one lossless WebP atlas a style (64 columns of 64 px tiles on white) and `captions.json`, which names style,
caption, concept and split of every tile. About 6,200 images: hidden icons and skin-tone variants are left out.
The split is by concept, so a held-out caption is a held-out picture in every style.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tbcm.errors import UserError, command
from tbcm.paths import path_argument
from tbcm.runtime.files import atomic_path, write_json

SIZE = 64  # pixels, both ways
COLUMNS = 64  # tiles in a row of an atlas
HELD_OUT = 0.05  # share of concepts kept from training

_TONES = re.compile(r"-skin-tone|-(medium-light|medium-dark|light|medium|dark)(?=-|$)")
_PEOPLE = re.compile(r"(^|-)(man|woman|men|women|person|people)(?=-|$)|-facing-right$")


@dataclass(frozen=True)
class Package:
    """An npm package of SVG icons in the Iconify format, and the word that names its style in captions."""

    style: str
    name: str
    version: str

    @property
    def tarball(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = (
    Package("noto", "@iconify-json/noto", "1.2.9"),
    Package("noto v1", "@iconify-json/noto-v1", "1.2.5"),
    Package("fluent", "@iconify-json/fluent-emoji", "1.2.7"),
    Package("fluent flat", "@iconify-json/fluent-emoji-flat", "1.2.6"),
)


@dataclass(frozen=True)
class Entry:
    """One image: the tile `index` of its style's atlas."""

    style: str
    index: int
    caption: str
    concept: str
    held_out: bool


@dataclass(frozen=True)
class EmojiImages:
    """Images [n, 3, 64, 64] uint8 with one entry each, in the same order."""

    images: Tensor
    entries: list[Entry]

    def split(self, held_out: bool) -> EmojiImages:
        keep = [i for i, entry in enumerate(self.entries) if entry.held_out == held_out]
        return EmojiImages(self.images[keep], [self.entries[i] for i in keep])


def caption_of(slug: str, style: str) -> str:
    """`chocolate-bar`, `noto` -> `chocolate bar, noto`."""
    return f"{slug.replace('-', ' ')}, {style}"


def concept_of(slug: str) -> str:
    """The slug without who does it and which way they face: `woman-running-facing-right` and `man-running` share
    `running`, since they look too alike to stand on two sides of a split. A slug of nothing else stays whole."""
    return _PEOPLE.sub("", slug).strip("-") or slug


def is_held_out(concept: str, share: float = HELD_OUT) -> bool:
    """A hash decides, so that neither the order nor the set of the packages matters."""
    digest = hashlib.sha256(concept.encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def visible_slugs(icons: dict[str, dict[str, Any]]) -> list[str]:
    """Sorted names without hidden icons and without skin-tone variants of other icons."""

    def is_tone_variant(slug: str) -> bool:
        plain = _TONES.sub("", slug)
        return "-skin-tone" in slug or (plain != slug and plain in icons)

    return sorted(slug for slug, icon in icons.items() if not icon.get("hidden") and not is_tone_variant(slug))


def render(icon: dict[str, Any], default_size: int, size: int = SIZE) -> Image.Image:
    """An Iconify icon as an RGB image of `size` x `size` pixels on white, centred where it is not square."""
    try:
        import resvg_py  # only the recipe needs it, not those who read an atlas
    except ModuleNotFoundError as error:
        raise UserError("emoji dataset: rendering needs the package resvg-py: pip install tbcm[emoji]") from error
    width, height = icon.get("width", default_size), icon.get("height", default_size)
    side = max(width, height)
    left, top = icon.get("left", 0) - (side - width) / 2, icon.get("top", 0) - (side - height) / 2
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {side} {side}" width="{side}" height="{side}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def fetch(folder: Path) -> None:
    """Downloads the tarballs of `PACKAGES` with `npm pack`."""
    specs = [f"{package.name}@{package.version}" for package in PACKAGES]
    try:
        done = subprocess.run(
            ["npm", "pack", "--silent", "--pack-destination", str(folder), *specs], capture_output=True, text=True
        )
    except FileNotFoundError:
        raise UserError(
            "emoji dataset: `npm` is not installed; install it, or pass --packages DIR with the tarballs"
        ) from None
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"emoji dataset: `npm pack` failed ({reason}); check the network, or pass --packages DIR")


def read_icons(tarball: Path) -> dict[str, Any]:
    """The `icons.json` of an Iconify tarball."""
    if not tarball.is_file():
        raise UserError(f"emoji dataset: {tarball} is missing; fetch it with `npm pack`, or leave --packages out")
    try:
        with tarfile.open(tarball) as archive:
            member = archive.extractfile("package/icons.json")
            data: dict[str, Any] = json.loads(member.read() if member else b"")
    except (tarfile.TarError, EOFError, KeyError, ValueError) as error:
        raise UserError(f"emoji dataset: {tarball} is no package of icons ({error}); download it again") from error
    return data


def atlas_name(style: str) -> str:
    return f"{style.replace(' ', '-')}.webp"


def write_atlas(path: Path, tiles: list[Image.Image], columns: int = COLUMNS) -> None:
    """Square tiles of one size, row by row, as one lossless WebP image."""
    side = tiles[0].width
    sheet = Image.new("RGB", (columns * side, -(-len(tiles) // columns) * side), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * side, i // columns * side))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="WEBP", lossless=True, quality=100, method=4, exact=True)


def read_atlas(path: Path, count: int, size: int = SIZE) -> Tensor:
    """The first `count` tiles of an atlas, [count, 3, size, size] uint8."""
    if not path.is_file():
        raise UserError(f"emoji dataset: {path} is missing; make it with `python -m tbcm.emoji.dataset {path.parent}`")
    with Image.open(path) as image:
        sheet = torch.from_numpy(np.array(image.convert("RGB")))  # [rows * size, columns * size, 3]
    tiles = sheet.unfold(0, size, size).unfold(1, size, size).flatten(0, 1)  # [tiles, 3, size, size]
    return tiles[:count].contiguous()


def load_images(folder: str | Path) -> EmojiImages:
    """What `build` wrote. Raises UserError where a file is missing."""
    folder = Path(folder)
    captions = folder / "captions.json"
    if not captions.is_file():
        raise UserError(f"emoji dataset: {captions} is missing; make it with `python -m tbcm.emoji.dataset {folder}`")
    entries = [Entry(**row) for row in json.loads(captions.read_text())["images"]]
    counts = Counter(entry.style for entry in entries)  # in the order of the file
    images = torch.cat([read_atlas(folder / atlas_name(style), count) for style, count in counts.items()])
    return EmojiImages(images, entries)


def _render_package(tarball: Path, package: Package) -> Iterator[tuple[Entry, Image.Image]]:
    data = read_icons(tarball)
    for index, slug in enumerate(visible_slugs(data["icons"])):
        concept = concept_of(slug)
        entry = Entry(package.style, index, caption_of(slug, package.style), concept, is_held_out(concept))
        yield entry, render(data["icons"][slug], data.get("width", 16))


def build(out: Path, packages: Path) -> int:
    """Renders every package under `packages` (a folder of npm tarballs) into `out`; returns the number of images."""
    entries: list[Entry] = []
    for package in PACKAGES:
        rendered = list(_render_package(packages / package.tarball, package))
        write_atlas(out / atlas_name(package.style), [tile for _, tile in rendered])
        entries += [entry for entry, _ in rendered]
    table = {"size": SIZE, "columns": COLUMNS, "images": [asdict(entry) for entry in entries]}
    write_json(out / "captions.json", table)
    return len(entries)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tbcm.emoji.dataset", description="Render the emoji images and their captions."
    )
    parser.add_argument("out", type=path_argument, help="folder for the atlases and captions.json")
    parser.add_argument(
        "--packages", type=path_argument, help="folder of npm tarballs (otherwise `npm pack` fetches them)"
    )
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.packages is None:
            fetch(Path(temporary))
        count = build(arguments.out, arguments.packages or Path(temporary))
    print(f"{count} images -> {arguments.out}")


if __name__ == "__main__":
    sys.exit(main())
