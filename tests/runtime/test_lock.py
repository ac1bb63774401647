from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tbcm.errors import UserError
from tbcm.runtime.lock import RunLock

ROOT = Path(__file__).parents[2]

HOLD = """
import sys
from tbcm.runtime.lock import RunLock
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
