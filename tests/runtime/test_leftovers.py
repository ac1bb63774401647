from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
from pathlib import Path

import pytest
from runtime.test_files import files, python

from tbcm.runtime.files import atomic_folder
from tbcm.runtime.leftovers import remove_leftovers, temporary

REPLACE_AND_DIE = """
import os, pathlib, signal, sys
from tbcm.runtime.files import atomic_folder
target, real = pathlib.Path(sys.argv[1]), pathlib.Path.replace
def dying(self, other):
    if other == target:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, other)
pathlib.Path.replace = dying
with atomic_folder(target) as part:
    (part / "weights").write_text("new")
"""


def test_what_a_killed_process_had_put_aside_is_put_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as part:
        (part / "weights").write_text("old")
    assert python(REPLACE_AND_DIE, target).wait(60) == -signal.SIGKILL
    assert not target.exists() and len(files(tmp_path)) == 2  # the new one and the old one, both under other names
    with caplog.at_level(logging.INFO, "tbcm"):
        remove_leftovers(tmp_path)
    assert (target / "weights").read_text() == "old" and files(tmp_path) == ["model"]
    assert f"{target}: put back" in caplog.text


def test_leftovers_go_and_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, user_folder: Path) -> None:
    left = [temporary(tmp_path / name) for name in ("a.json", "step-00000001", "b.tar.gz", "linked")]
    left[0].write_text("half")
    left[1].mkdir()
    (left[1] / "half").write_text("")
    left[2].touch()
    left[3].symlink_to(user_folder)
    with caplog.at_level(logging.INFO, "tbcm"):
        remove_leftovers(tmp_path, tmp_path / "missing")
    assert files(tmp_path) == ["user"] and files(user_folder) == ["thesis.txt"]
    assert all(f"{path}: removed" in caplog.text for path in left)


HEX = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    "name",
    [
        ".tmp-notes",
        ".tmp-0a1b2c3d-notes",
        ".tbcm",
        ".tbcm-notes",
        f".tbcm-{HEX}",
        f".tbcm-{HEX}-notes",
        f".tbcm-{HEX}-part-notes",
        f".tbcm-{HEX}-part.my notes",
        f".tbcm-{HEX}-older",
        f".tbcm-{HEX[1:]}-part",
        f".tbcm-{HEX}0-part",
        f".tbcm-{HEX.upper()}-part",
        f".TBCM-{HEX}-part",
        f"tbcm-{HEX}-part",
        f"my.tbcm-{HEX}-part",
        f".tbcm-{HEX}-part\n",
    ],
)
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_only_looks_like_a_leftover_stays(tmp_path: Path, user_folder: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    if kind == "link":
        path.symlink_to(user_folder)
    else:
        shutil.copytree(user_folder, path) if kind == "folder" else path.write_text("years of work")
    remove_leftovers(tmp_path)
    kept = path if kind == "file" else path / "thesis.txt"
    assert kept.read_text() == "years of work" and path.is_symlink() == (kind == "link")


def test_what_cannot_be_removed_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stuck = temporary(tmp_path / "a")
    (stuck / "deep").mkdir(parents=True)

    def failing(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(shutil, "rmtree", failing)
    for _ in range(3):
        remove_leftovers(tmp_path)
    assert caplog.text.count(str(stuck)) == 1 and "busy" in caplog.text
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert files(tmp_path) == []
