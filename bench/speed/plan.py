"""A plan of commands, each under a time limit of its own, whose results are there as soon as they are made."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tbcm.runtime.files import write_json

REPORT, LOG = "report.json", "log.txt"
LOG_TAIL = 2**18
"""Characters of a step's output that are kept: its last ones."""

Status = Literal["done", "failed", "out of time", "left out"]


@dataclass(frozen=True)
class Step:
    """A command, what it answers, and how many seconds it may take."""

    name: str
    what: str
    command: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """`left out`: there was no time for it, and it is to be run again."""

    name: str
    status: Status
    seconds: float
    limit: float
    what: str
    command: str


def carry_out(
    steps: Sequence[Step], out: Path, *, limit: float, environment: Mapping[str, str] | None = None
) -> list[Outcome]:
    """Runs the steps in order, within `limit` seconds in all. Those that an earlier call has done, by the report in
    `out`, are not run again. After each step the report is written anew and its output is added to the log."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    found = {each.name: each for each in read_report(out) if each.status == "done"}
    for step in steps:
        if step.name in found:
            continue
        left = limit - (time.monotonic() - began)
        outcome = _run(step, out, left, environment) if left > 1 else _outcome(step, "left out", 0.0)
        found[step.name] = outcome
        write_json(out / REPORT, [asdict(found[each.name]) for each in steps if each.name in found])
    return [found[step.name] for step in steps]


def read_report(out: Path) -> list[Outcome]:
    """What earlier calls have written; nothing where there is no report."""
    file = out / REPORT
    return [Outcome(**each) for each in json.loads(file.read_text(encoding="utf-8"))] if file.is_file() else []


def _run(step: Step, out: Path, left: float, environment: Mapping[str, str] | None) -> Outcome:
    print(f"{step.name}: {step.what} (at most {min(step.seconds, left):.0f} s)", flush=True)
    began, status = time.monotonic(), "done"
    with (out / f".{step.name}.txt").open("w+b") as said:
        process = subprocess.Popen(
            step.command,
            stdout=said,
            stderr=said,
            env=dict(os.environ) | dict(environment or {}),
            start_new_session=True,
        )
        try:
            if process.wait(min(step.seconds, left)):
                status = "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            _end(process)
        said.seek(0)
        text = said.read().decode("utf-8", "replace")
    Path(said.name).unlink()
    seconds = time.monotonic() - began
    with (out / LOG).open("a", encoding="utf-8") as log:
        log.write(f"=== {step.name}: {status} after {seconds:.1f} s: {' '.join(step.command)}\n{text[-LOG_TAIL:]}\n")
    print(f"{step.name}: {status} after {seconds:.1f} s", flush=True)
    return _outcome(step, status, seconds)  # type: ignore[arg-type]


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _outcome(step: Step, status: Status, seconds: float) -> Outcome:
    return Outcome(step.name, status, round(seconds, 1), step.seconds, step.what, " ".join(step.command))
