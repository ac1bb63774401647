"""README and docs name what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
_PATH = re.compile(r"`((?:tbcm|kernels|bench|tests|docs|csrc)/[\w/.]+?)`")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    links = {link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link}
    assert not [link for link in sorted(links) if not (ROOT / name).parent.joinpath(link).exists()]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_are_there(name: str) -> None:
    """But for rows that have not been measured yet."""
    found = set(_PATH.findall((ROOT / name).read_text(encoding="utf-8")))
    assert not [path for path in sorted(found) if not (ROOT / path).exists() and "bench/results" not in path]
