"""The icon sets: npm packages in the Iconify format, pinned, each under MIT, Apache-2.0 or ISC by its own info.json."""

from __future__ import annotations

import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tbcm.errors import UserError

LICENSES = ("MIT", "Apache-2.0", "ISC")

VERSIONS = {
    "akar-icons": "1.2.7",
    "ant-design": "1.2.9",
    "bi": "1.2.7",
    "bx": "1.2.3",
    "bxs": "1.2.3",
    "carbon": "1.2.29",
    "clarity": "1.2.4",
    "ep": "1.2.4",
    "eva": "1.2.3",
    "f7": "1.2.2",
    "famicons": "1.2.2",
    "feather": "1.2.1",
    "flowbite": "1.2.7",
    "fluent": "1.2.60",
    "fluent-mdl2": "1.2.1",
    "fontisto": "1.2.1",
    "grommet-icons": "1.2.4",
    "heroicons": "1.2.3",
    "hugeicons": "1.2.35",
    "humbleicons": "1.2.20",
    "ic": "1.2.4",
    "icon-park-outline": "1.2.4",
    "icon-park-solid": "1.2.4",
    "iconoir": "1.2.11",
    "ion": "1.2.7",
    "ix": "1.2.12",
    "jam": "1.2.3",
    "la": "1.2.1",
    "lsicon": "1.2.5",
    "lucide": "1.2.137",
    "mage": "1.2.4",
    "majesticons": "1.2.5",
    "material-symbols": "1.2.98",
    "mdi": "1.2.3",
    "mingcute": "1.2.8",
    "mynaui": "1.2.19",
    "octicon": "1.2.36",
    "ph": "1.2.2",
    "proicons": "1.2.20",
    "ri": "1.2.10",
    "simple-line-icons": "1.2.1",
    "stash": "1.2.4",
    "tabler": "1.2.41",
    "tdesign": "1.2.19",
    "teenyicons": "1.2.2",
    "uil": "1.2.3",
    "vaadin": "1.2.1",
}

UNSEEN_SETS = ("bi", "mingcute")  # drawn by hands of their own, solid and outline; nothing is trained on them


@dataclass(frozen=True)
class IconSet:
    """One package: its icons by name (hidden ones left out), with sizes and bodies, and who made it under which
    licence."""

    prefix: str
    icons: dict[str, dict[str, Any]]
    author: str
    license: str
    url: str


def package_name(prefix: str) -> str:
    return f"@iconify-json/{prefix}"


def tarball(prefix: str, version: str) -> str:
    """The file name that `npm pack` gives."""
    return f"iconify-json-{prefix}-{version}.tgz"


def fetch(folder: Path) -> None:
    """Downloads the tarballs of `VERSIONS` with `npm pack`; those that lie there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [
        f"{package_name(prefix)}@{version}"
        for prefix, version in VERSIONS.items()
        if not (folder / tarball(prefix, version)).is_file()
    ]
    if not missing:
        return
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), *missing]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("icons: `npm` is not installed; install it, or pass --packages DIR with the tarballs") from None
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"icons: `npm pack` failed ({reason}); check the network, or pass --packages DIR")


def read_set(path: Path) -> IconSet:
    """Reads an Iconify tarball.

    Raises:
        UserError: the file is missing, is no such package, or its licence is not one of `LICENSES`.
    """
    if not path.is_file():
        raise UserError(f"icons: {path} is missing; fetch it with `npm pack`, or leave --packages out")
    try:
        with tarfile.open(path) as archive:
            data, info = (_read_json(archive, f"package/{name}.json") for name in ("icons", "info"))
            license_ = info["license"]["spdx"]
            defaults = {key: data[key] for key in ("left", "top", "width", "height") if key in data}
            icons = {name: {**defaults, **icon} for name, icon in data["icons"].items() if not icon.get("hidden")}
            prefix, author, url = data["prefix"], info["author"]["name"], info["author"].get("url", "")
    except (tarfile.TarError, EOFError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"icons: {path} is no package of icons ({error!r}); download it again") from error
    if license_ not in LICENSES:
        raise UserError(f"icons: {path} is under {license_}; only {', '.join(LICENSES)} are used")
    return IconSet(prefix, icons, author, license_, url)


def _read_json(archive: tarfile.TarFile, name: str) -> Any:
    member = archive.extractfile(name)
    return json.loads(member.read() if member else b"")
