"""A tiny run and its student, of which every figure is drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny import write_config, write_teacher

from tbcm import train


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    (folder / "prompts.txt").write_text("\n".join(f"a {c} ball" for c in ("red", "green", "blue", "black", "white")))
    path = write_config(
        folder / "c.yaml",
        write_teacher(folder / "teacher"),
        folder / "prompts.txt",
        folder / "run",
        train={"steps": 1, "prompts_per_step": 2},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tbcm", str(path)])
        assert train.main() == 0
    return folder / "run"
