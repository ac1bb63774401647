from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tbcm.icons import dataset, packages
from tbcm.icons.dataset import build
from tbcm.icons.packages import tarball

SETS = {"one": "1.0.0", "two": "1.0.0", "bi": "2.0.0"}  # "bi" is a set that nothing is trained on


def disk(radius: float, x: float = 8) -> dict[str, Any]:
    return {"body": f'<circle cx="{x}" cy="8" r="{radius}"/><rect x="1" y="{radius}" width="2" height="1"/>'}


def ring(size: float) -> dict[str, Any]:
    return {"body": f'<rect x="2" y="2" width="12" height="{size}" fill="none" stroke="#000" stroke-width="1"/>'}


# 16 px icons: what a renderer and the filters have to get right.
ICONS: dict[str, dict[str, dict[str, Any]]] = {
    "one": {
        "heart": disk(4),
        "heart-fill": disk(5),
        "heart-outline": ring(12),
        "cog-24-regular": ring(6),
        "heart-broken": disk(3),  # a compound
        "heart-line": disk(6),  # whose name tells the wrong style
        "facebook": disk(7),  # no concept
        "old-heart": {**disk(2), "hidden": True},
    },
    "two": {"outline-favourite": ring(9), "heart-filled": disk(5), "gear": ring(8), "gear-duotone": ring(3)},
    "bi": {"heart": ring(5), "heart-off": disk(6)},
}


def write_package(path: Path, prefix: str, license_: str = "MIT") -> None:
    files = {
        "icons": {"prefix": prefix, "width": 16, "height": 16, "icons": ICONS[prefix]},
        "info": {"author": {"name": f"Author {prefix}", "url": "u"}, "license": {"spdx": license_}},
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of npm tarballs with the icons above, in the place of the real sets."""
    for module in (dataset, packages):
        monkeypatch.setattr(module, "VERSIONS", SETS)
    monkeypatch.setattr(dataset, "FEWEST", 1)
    monkeypatch.setattr(dataset, "SHAPES", 1.0)
    folder = tmp_path / "packages"
    folder.mkdir()
    for prefix, version in SETS.items():
        write_package(folder / tarball(prefix, version), prefix)
    return folder


@pytest.fixture
def data(tmp_path: Path, npm: Path) -> Path:
    """A dataset of eight drawings of two concepts."""
    build(tmp_path / "data", npm)
    return tmp_path / "data"
