from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from tbcm.errors import UserError
from tbcm.runtime.files import RunLock, atomic_folder, atomic_path, write_json

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
