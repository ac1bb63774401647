"""Under torchrun a rank that fails ends the run in the stated time, and the output names it and says why."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("faulty_run.py")
FORKING = [str(Path(__file__).with_name("forking_torchrun.py")), "tbcm.runtime.log,tbcm.runtime.watchdog"]
TIMEOUT = 3.0  # its grace is 1.5 s
STATED = TIMEOUT + 1.5 + 60  # and a minute for a machine that is busy
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[Start]:
    """Starts torchrun with two ranks that write to `tmp_path`; nothing of it is left after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(fault: str, *arguments: str, forking: bool = True) -> subprocess.Popen[str]:
        torchrun = FORKING if forking else ["-m", "torch.distributed.run"]
        command = [sys.executable, *torchrun, *(arguments or ("--standalone", "--nproc_per_node", "2"))]
        path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
        process = subprocess.Popen(
            [*command, str(SCRIPT), str(tmp_path), fault, str(TIMEOUT)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
    for pid in ranks(tmp_path):
        if pid is not None and is_alive(pid):
            os.kill(pid, signal.SIGKILL)


def log(folder: Path, rank: int) -> str:
    path = folder / "logs" / f"rank-{rank:05d}.log"
    return path.read_text() if path.exists() else ""


def ranks(folder: Path) -> list[int | None]:
    """The process ids of rank 0 and 1, None for one that has not begun."""
    found = [re.findall(r"process (\d+) begins", log(folder, rank)) for rank in (0, 1)]
    return [int(pids[-1]) if pids else None for pids in found]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until(condition: Callable[[], object], seconds: float = math.inf) -> float:
    """Waits for it; returns how long it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "not in time"
        time.sleep(0.05)
    return time.monotonic() - started


def outcome(process: subprocess.Popen[str]) -> str:
    """All that torchrun wrote, once it has failed."""
    output, _ = process.communicate()
    assert process.returncode == 1, output
    return output


def root_cause(output: str) -> str:
    """The part of torchrun's summary that shows what failed first."""
    return output.split("Root Cause")[1]


def lived(folder: Path, rank: int) -> float:
    """Seconds from a rank's first message to its last."""
    times = re.findall(r"^\d{4}-\d\d-\d\d (\d\d):(\d\d):(\d\d),(\d{3}) rank", log(folder, rank), re.MULTILINE)
    first, last = ((3600 * int(h) + 60 * int(m) + int(s) + int(ms) / 1000) for h, m, s, ms in (times[0], times[-1]))
    return (last - first) % 86_400


def test_without_a_fault_it_ends_well(torchrun: Start, tmp_path: Path) -> None:
    process = torchrun("none")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert all(log(tmp_path, rank).rstrip().endswith("done") for rank in (0, 1))


def test_a_rank_that_hangs_shows_its_stack(torchrun: Start, tmp_path: Path) -> None:
    output = outcome(torchrun("hang"))
    host = socket.gethostname()
    # The other rank waits for it in a collective where it seems to work; whichever ends first shows both.
    assert re.search(rf"of 2 \({re.escape(host)}\) has been at step 3 for \d+ s, here:", root_cause(output))
    assert f"rank 1 of 2 ({host})" in root_cause(output) or f"rank 1 ({host}): working at step 3" in root_cause(output)
    assert "in sleep_for_ever" in root_cause(output) and "in all_true" in root_cause(output)
    assert any("in sleep_for_ever" in log(tmp_path, rank) for rank in (0, 1))
    assert TIMEOUT < max(lived(tmp_path, rank) for rank in (0, 1)) < STATED


def test_a_rank_that_raises_shows_its_traceback(torchrun: Start, tmp_path: Path) -> None:
    output = outcome(torchrun("raise", forking=False))  # as users start it
    for text in (root_cause(output), log(tmp_path, 1)):
        assert "failed at step 3: ValueError: a bad day" in text
        assert "Traceback" in text and 'raise ValueError("a bad\\nday")' in text
    assert "exitcode  : 1 " in root_cause(output)
    assert lived(tmp_path, 1) < STATED


def test_a_user_error_is_one_line(torchrun: Start, tmp_path: Path) -> None:
    output = outcome(torchrun("user_error"))
    line = "error: the prompts of this rank are gone: bring them back"
    assert f"[rank 1] {line}" in output
    assert f"traceback : {line}\n" in root_cause(output)
    assert "exitcode  : 2 " in root_cause(output)
    assert line in log(tmp_path, 1)


def test_a_rank_with_nan_is_named_by_all(torchrun: Start, tmp_path: Path) -> None:
    output = outcome(torchrun("nan"))
    line = f"in 2 updates in a row at step 1 (the loss: on rank 1 ({socket.gethostname()})): lower"
    assert line in root_cause(output) and "error: loss or gradient was not finite" in output
    assert any(line in log(tmp_path, rank) for rank in (0, 1))


def test_a_frozen_rank_is_named_by_the_one_that_waits(torchrun: Start, tmp_path: Path) -> None:
    process = torchrun("stop")
    until(lambda: None not in ranks(tmp_path) or process.poll() is not None)
    frozen = ranks(tmp_path)[1]
    assert frozen is not None
    until(lambda: "no sign of life" in log(tmp_path, 0), STATED)
    os.kill(frozen, signal.SIGKILL)  # torchrun would, 30 s after a SIGTERM that a frozen process does not see
    output = outcome(process)
    for text in (output, log(tmp_path, 0)):
        assert "rank 0 of 2" in text and "has waited for others at step 3" in text
        assert "no sign of life any more (killed, frozen or cut off) from rank 1" in text
    assert TIMEOUT < lived(tmp_path, 0) < STATED


def test_ranks_that_wait_for_one_another_end_too(torchrun: Start, tmp_path: Path) -> None:
    output = outcome(torchrun("deadlock"))
    assert "has waited for others at step 3" in root_cause(output)
    assert "all ranks wait for one another" in root_cause(output)
    assert TIMEOUT < min(lived(tmp_path, rank) for rank in (0, 1)) < STATED


def test_a_killed_rank_is_named_on_its_node_and_on_the_other(torchrun: Start, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = [
        torchrun("kill", *f"--nnodes 2 --node_rank {n} --master_addr 127.0.0.1 --master_port {port}".split())
        for n in range(2)
    ]
    outputs = [outcome(node) for node in nodes]
    assert "rank      : 1 " in root_cause(outputs[1]) and "SIGKILL" in root_cause(outputs[1])
    for text in (root_cause(outputs[0]), log(tmp_path, 0)):
        assert "lost the connection to another rank at step 3: no sign of life any more" in text
        assert "from rank 1 (" in text
    assert lived(tmp_path, 0) < STATED


def test_ranks_do_not_outlive_their_torchrun(torchrun: Start, tmp_path: Path) -> None:
    process = torchrun("hang")
    until(lambda: None not in ranks(tmp_path) or process.poll() is not None)
    process.kill()
    until(lambda: not any(is_alive(pid) for pid in ranks(tmp_path) if pid is not None), STATED)
    assert "the torchrun that started it is gone" in log(tmp_path, 0) + log(tmp_path, 1)
