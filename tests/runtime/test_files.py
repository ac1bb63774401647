from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tbcm.errors import UserError
from tbcm.runtime.files import atomic_folder, atomic_path

ROOT = Path(__file__).parents[2]


def python(code: str, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_path_writes_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.png"
    for text in ("one", "two"):
        with atomic_path(target) as part:
            assert part.suffix == ".png"  # writers go by the suffix
            assert part.parent == target.parent  # else os.replace could cross file systems
            part.write_text(text)
    assert target.read_text() == "two"
    assert files(target.parent) == ["a.png"]


def test_atomic_path_keeps_the_old_file_when_the_writer_fails(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as part:  # noqa: PT012
        part.write_text("half")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    assert files(tmp_path) == ["a.txt"]


def test_a_kill_between_write_and_replace_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    code = """
import os, signal, sys
from tbcm.runtime.files import atomic_path
with atomic_path(sys.argv[1]) as part:
    part.write_text("new")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert python(code, target).wait(30) == -signal.SIGKILL
    assert target.read_text() == "old"
    assert len(files(tmp_path)) == 2  # it did get as far as the temporary file


def test_atomic_folder_replaces_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for name in ("one", "two"):
        with atomic_folder(target) as part:
            (part / "deep").mkdir()
            (part / "deep" / name).write_text(name)
            assert not (target / "deep" / name).exists()
    assert files(target / "deep") == ["two"]
    assert files(tmp_path) == ["model"]


def test_atomic_folder_keeps_the_old_folder_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as part:
        (part / "weights").write_text("old")
    real = Path.replace

    def failing(self: Path, other: Path) -> Path:
        if other == target and not (self / "weights").exists():
            raise OSError(errno.ENOSPC, "no space")
        return real(self, other)

    monkeypatch.setattr(Path, "replace", failing)  # the old folder is already aside when this fails
    with pytest.raises(UserError, match="model"), atomic_folder(target) as part:
        (part / "other").write_text("new")
    assert (target / "weights").read_text() == "old"
    assert files(tmp_path) == ["model"]


@pytest.mark.parametrize("name", ["x" * 255, "x" * 248 + ".json1", "é" * 127, "a." + "b" * 253, "名前" * 40])
def test_names_as_long_as_a_disk_takes(tmp_path: Path, name: str) -> None:
    with atomic_path(tmp_path / name) as part:
        part.write_text("file")
    with atomic_folder(tmp_path / "deep" / name) as part:
        (part / name).write_text("folder")
    with atomic_folder(tmp_path / "deep" / name):
        pass
    assert files(tmp_path) == ["deep", name] if name > "deep" else [name, "deep"]
    assert files(tmp_path / "deep") == [name] and files(tmp_path / "deep" / name) == []


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path, user_folder: Path) -> None:
    for target in (user_folder, tmp_path / "nowhere"):
        link = tmp_path / "out"
        link.symlink_to(target)
        with atomic_folder(link) as part:
            (part / "new").write_text("")
        assert not link.is_symlink() and files(link) == ["new"]
        shutil.rmtree(link)
        assert files(tmp_path) == ["user"] and files(user_folder) == ["thesis.txt"]


def test_a_link_is_put_back_when_the_writer_fails(tmp_path: Path, user_folder: Path) -> None:
    (tmp_path / "out").symlink_to(user_folder)
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out"):
        raise ZeroDivisionError
    assert (tmp_path / "out").readlink() == user_folder and files(tmp_path) == ["out", "user"]
