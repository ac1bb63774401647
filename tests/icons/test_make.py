from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tbcm.icons import autoencoder, make, teacher
from tbcm.icons.training import Budget


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the two trainings were called with."""
    called: list[tuple[Any, ...]] = []
    monkeypatch.setattr(autoencoder, "train", lambda *arguments: called.append(("autoencoder", *arguments)))
    monkeypatch.setattr(teacher, "train", lambda *arguments: called.append(("teacher", *arguments)))
    return called


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["make", *map(str, words)])
    return make.main()


def test_every_stage_in_order_and_the_drawings_once(
    npm: Path, tmp_path: Path, stages: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, out = tmp_path / "work", tmp_path / "assets"
    words = [work, out, "--packages", npm, "--steps", 5, "--cooldown-steps", 2, "--device", "cpu"]
    assert run(monkeypatch, *words) == 0
    first = ("autoencoder", work, work / "autoencoder", make.AUTOENCODER, "cpu")
    assert stages == [first, ("teacher", work, out, Budget(steps=5, cooldown=2), "cpu", None)]
    made = (work / "drawings.webp").stat().st_mtime_ns
    assert run(monkeypatch, *words) == 0
    assert (work / "drawings.webp").stat().st_mtime_ns == made and len(stages) == 4


def test_drawings_that_were_interrupted_are_made_again(
    npm: Path, tmp_path: Path, stages: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    make.make_drawings(work, npm)
    (work / "shapes.json").unlink()
    (work / "drawings.json").write_text("{}")
    make.make_drawings(work, npm)
    assert (work / "shapes.json").is_file() and "heart" in (work / "drawings.json").read_text()


def test_going_on_from_assets_needs_neither_packages_nor_autoencoder(
    npm: Path, tmp_path: Path, stages: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "shipped"
    assert run(monkeypatch, tmp_path / "work", "out", "--packages", npm, "--resume-from", shipped) == 0
    assert [name for name, *_ in stages] == ["teacher"] and stages[0][-1] == shipped
    assert not (tmp_path / "work").exists()


def test_a_senseless_budget_is_one_line(
    npm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path / "work", "out", "--packages", npm, "--steps", 0) == 2
    assert capsys.readouterr().err.startswith("error: --steps")
    assert not (tmp_path / "work").exists()
