"""The console command `tbcm`."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tbcm
from tbcm import __main__ as console
from tbcm.runtime import commit

ROOT = Path(tbcm.__file__).parents[1]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tbcm", *arguments])
    return console.main()


@pytest.mark.parametrize("name", console.COMMANDS)
def test_help_of_every_command(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        run(monkeypatch, name, "--help")
    module = console._MODULES.get(name, f"tbcm.{name}").removesuffix(".__main__")
    assert done.value.code == 0 and f"usage: python -m {module} " in capsys.readouterr().out


def test_every_module_that_is_a_command_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {path.stem for path in (ROOT / "tbcm").glob("*.py")} - {"__init__", "__main__", "errors"}
    assert {name.replace("-", "_") for name in console.COMMANDS} == files | {"figures"}


def test_arguments_and_exit_codes_are_the_commands_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "train", "no-such.yaml", "train.steps=1", "--dry-run") == 2
    assert capsys.readouterr().err.startswith("error: no-such.yaml")


def test_a_wrong_turn_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        run(monkeypatch, "trian")
    assert done.value.code == 2
    assert "'trian'" in (said := capsys.readouterr().err.splitlines()[-1]) and "'train'" in said


def test_the_version_has_the_commit_of_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def git(*arguments: str) -> str:
        names = "-c", "user.name=a", "-c", "user.email=a@example.org"
        return subprocess.run(
            ["git", *names, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    def said() -> str:
        with pytest.raises(SystemExit):
            run(monkeypatch, "--version")
        return capsys.readouterr().out.strip()

    monkeypatch.setattr(commit, "ROOT", tmp_path)
    assert said() == f"tbcm {tbcm.__version__}"
    git("init", "--quiet")
    (tmp_path / "tbcm").mkdir()
    (tmp_path / "tbcm" / "a.py").write_text("a = 1\n")
    git("add", ".")
    git("commit", "--quiet", "--message", "a")
    at = git("rev-parse", "--short", "HEAD")
    assert said() == f"tbcm {tbcm.__version__} ({at})"
    (tmp_path / "tbcm" / "a.py").write_text("a = 2\n")
    assert said() == f"tbcm {tbcm.__version__} ({at}+)"
    assert commit.commit("docs") == at


def test_it_is_installed() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    (target,) = scripts.values()
    module, _, name = target.partition(":")
    assert callable(getattr(importlib.import_module(module), name)) and list(scripts) == ["tbcm"]
