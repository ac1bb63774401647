"""What commands that fill a folder do when they end well, and when they do not."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from tbcm import encode, encode_images, evaluate
from tbcm.errors import UserError
from tbcm.runtime import distributed, failure
from tbcm.runtime.job import job
from tbcm.runtime.lock import RunLock

CONFIG = str(Path(__file__).parents[2] / "configs" / "icons.yaml")


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows when the process group is left."""
    left: list[str] = []
    monkeypatch.setattr(distributed, "shutdown", lambda: left.append("left"))
    return left


def test_a_job_has_its_folder_alone_and_leaves_the_group(tmp_path: Path, left: list[str]) -> None:
    with job(tmp_path, "cpu") as device:
        assert device.type == "cpu" and not left
        with pytest.raises(UserError, match="in use"):
            RunLock(tmp_path).acquire()
    assert left == ["left"]
    RunLock(tmp_path).acquire()


def test_the_group_is_not_left_after_an_error(tmp_path: Path, left: list[str]) -> None:
    """The other ranks may be stuck, and leaving would wait for them."""
    with pytest.raises(ZeroDivisionError), job(tmp_path, "cpu"):
        raise ZeroDivisionError
    assert not left
    RunLock(tmp_path).acquire()


@pytest.mark.parametrize(
    ("module", "arguments"),
    [(encode, ["prompts.txt", "out", "--config", CONFIG]), (encode_images, [CONFIG, "out"]), (evaluate, ["icons"])],
)
def test_a_rank_that_fails_is_ended(module: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[BaseException] = []
    monkeypatch.setattr(failure, "_end_rank", ended.append)
    monkeypatch.setattr(failure.faulthandler, "enable", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["tbcm", *arguments, "--batch", "0"])
    assert module.main() == 2
    (error,) = ended
    assert isinstance(error, UserError) and "--batch 0" in str(error)
