from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tbcm.emoji.dataset import PACKAGES, build

# 16 px icons: what a renderer and the filters have to get right. `factory` is a held-out concept, `cat` is not.
ICONS: dict[str, dict[str, Any]] = {
    "cat": {"body": '<rect width="16" height="16" fill="#f00"/>'},
    "factory": {"body": '<rect width="16" height="16" fill="#000" fill-opacity="0.5"/>'},
    "man-running": {"body": '<rect width="8" height="16" fill="#00f"/>'},
    "woman-running": {"body": '<rect width="16" height="8" fill="#00f"/>', "height": 8},
    "woman-running-dark-skin-tone": {"body": "<path/>"},
    "old-cat": {"body": "<path/>", "hidden": True},
}


def write_package(path: Path, icons: dict[str, dict[str, Any]]) -> None:
    data = json.dumps({"prefix": "test", "width": 16, "height": 16, "icons": icons}).encode()
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("package/icons.json")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder of npm tarballs, one for each package, with the icons above."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for package in PACKAGES:
        write_package(folder / package.tarball, ICONS)
    return folder


@pytest.fixture
def data(tmp_path: Path, packages: Path) -> Path:
    """A dataset of 16 images: 4 icons in 4 styles."""
    build(tmp_path / "data", packages)
    return tmp_path / "data"
