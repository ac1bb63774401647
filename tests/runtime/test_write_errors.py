from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from runtime.test_files import files
from safetensors import SafetensorError

from tbcm.errors import UserError
from tbcm.runtime.files import atomic_path, write_json


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
