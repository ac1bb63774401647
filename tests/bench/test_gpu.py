"""The plan of a day with a GPU: time limits, what is written when, and that it goes on where it was ended."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import gpu
import pytest
from scripts import script
from shrunk import shrink
from speed.plan import LOG_TAIL, Step, carry_out


def step(name: str, code: str, seconds: float = 60) -> Step:
    return Step(name, f"does {name}", (sys.executable, "-S", "-c", code), seconds)


def test_each_step_has_its_own_limit_and_all_are_reported(tmp_path: Path) -> None:
    sleeps = "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])"
    steps = [step("says", "print('hello')"), step("stays", sleeps, 0.5), step("fails", "raise SystemExit(3)")]
    began = time.monotonic()
    found = carry_out(steps, tmp_path, limit=30)
    assert time.monotonic() - began < 20
    assert [each.status for each in found] == ["done", "out of time", "failed"]
    assert [each["name"] for each in json.loads((tmp_path / "report.json").read_text())] == ["says", "stays", "fails"]
    assert "hello" in (tmp_path / "log.txt").read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log.txt", "report.json"]


def test_a_second_call_does_what_the_first_did_not(tmp_path: Path) -> None:
    counts = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    steps = [step("first", counts), step("second", "raise SystemExit(1)"), step("third", counts)]
    assert [each.status for each in carry_out(steps[:2], tmp_path, limit=60)] == ["done", "failed"]
    assert [each.status for each in carry_out(steps, tmp_path, limit=60)] == ["done", "failed", "done"]
    assert (tmp_path / "count").read_text() == "xx"


def test_what_there_is_no_time_for_is_left_out_and_said(tmp_path: Path) -> None:
    steps = [step("long", "import time; time.sleep(60)", 2), step("next", "print(1)")]
    assert [each.status for each in carry_out(steps, tmp_path, limit=2)] == ["out of time", "left out"]


def test_of_a_long_output_the_end_is_kept(tmp_path: Path) -> None:
    carry_out([step("talks", f"print('a' * {LOG_TAIL}); print('the end')")], tmp_path, limit=60)
    log = (tmp_path / "log.txt").read_text()
    assert log.rstrip().endswith("the end") and len(log) < LOG_TAIL + 500


@pytest.mark.parametrize("rehearse", [False, True])
def test_the_plan_asks_for_what_there_is(rehearse: bool, tmp_path: Path) -> None:
    """Scripts and tests that exist, at most eight files, and the first six within the minutes that a card is lent."""
    steps = gpu.plan(tmp_path, rehearse=rehearse)
    assert len({each.name for each in steps}) == len(steps)
    for each in steps:
        assert all(Path(part).exists() for part in each.command if part.endswith(".py"))
    assert sum(each.seconds for each in steps[:6]) < 540


def test_rehearsed_steps_are_real_ones(tmp_path: Path) -> None:
    """The profile: its table and its trace."""
    done = script(
        "bench/timeline.py",
        "--device",
        "cpu",
        "--model",
        "tiny",
        "--points",
        "3",
        "--arms",
        "dual",
        "--out",
        str(tmp_path),
        after=shrink,
    )
    assert done.returncode == 0, done.stderr
    assert "aten::" in (tmp_path / "profile.txt").read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["profile.json.gz", "profile.txt"]


def test_an_unknown_step_is_one_line() -> None:
    done = script("bench/gpu.py", "--only", "dance")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --only dance: no such step; choose of checks, fast")
