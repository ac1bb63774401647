from __future__ import annotations

from pathlib import Path

import pytest

from tbcm.errors import UserError
from tbcm.runtime.native import load_library


def test_a_library_that_is_missing_broken_or_old(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not built: run `python csrc/build\.py`"):
        load_library(tmp_path / "none.so")
    (tmp_path / "broken.so").write_text("no library")
    with pytest.raises(UserError, match="does not load"):
        load_library(tmp_path / "broken.so")
