from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    """A folder with a thesis, which nobody may touch."""
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    return folder
