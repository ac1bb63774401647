"""Runs a script as its users do, in a process of its own."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from warm_processes import started

ROOT = Path(__file__).parents[1]


def script(path: str, *arguments: str, after: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    """`python PATH ARGUMENTS` in the repository's root, without the seconds that imports take. `after` what is to be
    done first, which must pickle."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder, name) for name in ("out", "err"))
        with started(_run, [str(ROOT / path), *arguments], out, err, after) as process:
            process.join()
            assert process.exitcode is not None
        return subprocess.CompletedProcess(path, process.exitcode, out.read_text(), err.read_text())


def _run(command: list[str], out: Path, err: Path, after: Callable[[], None] | None) -> None:
    if after:
        after()
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.chdir(ROOT)
    sys.argv, sys.path = command, [str(Path(command[0]).parent), *sys.path]
    runpy.run_path(command[0], run_name="__main__")
