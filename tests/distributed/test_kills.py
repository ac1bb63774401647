"""The short form of soak.py: a few kills in `make test`, and that what it looks at shows what is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from end_state import differences, unreadable
from scripts import script
from tiny import tiny_config, tiny_parts

from tbcm.training.trainer import Trainer


def test_nothing_is_lost_to_a_few_kills(tmp_path: Path) -> None:
    options = ["--start", "fork", "--layouts", "ranks", "--steps", "12", "--kills", "3", "--seed", "51"]
    result = script("tests/distributed/soak.py", *options, "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 kills in" in result.stdout and "kill" in result.stdout.splitlines()[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    config = tiny_config(out, train={"steps": 2, "prompts_per_step": 2})
    Trainer(config, torch.device("cpu"), tiny_parts(config)).run()
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_copy_of_a_run_is_the_same_run(finished: Path, copy: Path) -> None:
    assert differences(copy, finished) == [] and unreadable(copy) == []


def test_another_run_is_told_from_it(finished: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train={"steps": 2, "prompts_per_step": 2, "seed": 1})
    Trainer(config, torch.device("cpu"), tiny_parts(config)).run()
    found = " ".join(differences(tmp_path, finished))
    assert all(part in found for part in ("student.", "ema.", "optimizer.", "step 2: loss"))


def test_rows_written_twice_are_seen(finished: Path, copy: Path) -> None:
    log = copy / "metrics.jsonl"
    log.write_text(log.read_text() * 2)
    assert "rows of steps [2, 2], not of [2]" in differences(copy, finished)[0]


def test_a_flipped_bit_and_a_second_temporary_folder_are_seen(copy: Path) -> None:
    file = next((copy / "checkpoints" / "step-00000002").glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for name in "ab":
        (copy / "checkpoints" / f".tbcm-{name}").mkdir()
    damaged, temporary = unreadable(copy)
    assert "step-00000002 cannot be read" in damaged and ".tbcm-a" in temporary
