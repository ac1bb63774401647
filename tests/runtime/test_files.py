from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from tbcm.errors import UserError
from tbcm.runtime.files import RunLock, atomic_folder, atomic_path, remove_leftovers, temporary, write_json

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


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "free some space"), (errno.EACCES, "permission"), (errno.EROFS, "read-only")],
)
def test_failed_writes_are_one_line_that_names_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    target = tmp_path / "a.json"
    write_json(target, "old")

    def failing(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(UserError) as caught:
        write_json(target, "new")
    assert str(target) in str(caught.value)
    assert advice in str(caught.value)
    assert "\n" not in str(caught.value)
    assert json.loads(target.read_text()) == "old"
    assert files(tmp_path) == ["a.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_disk(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="full"), atomic_path(tmp_path / "a"), Path("/dev/full").open("w") as full:
        full.write("x")


def test_an_error_that_only_quotes_its_number_is_understood(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="free some space"), atomic_path(tmp_path / "a.safetensors"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="stands where a folder is needed"):
        write_json(tmp_path / "out" / "a.json", 1)


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


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    """A folder with a thesis, which nobody may touch."""
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    return folder


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


HOLD = """
import sys
from tbcm.runtime.files import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_run_lock_refuses_a_second_process_and_a_kill_frees_it(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    for _ in range(2):  # a refusal must not wipe the owner's name
        with pytest.raises(UserError, match=f"{tmp_path} is in use by process {owner.pid} "):
            RunLock(tmp_path).acquire()
    owner.kill()
    owner.wait(30)
    with RunLock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} "):
        RunLock(tmp_path).acquire()
    with RunLock(tmp_path):
        pass
