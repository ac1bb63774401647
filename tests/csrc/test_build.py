"""Needs nvcc, no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tbcm.runtime.native import load_library

ROOT = Path(__file__).parents[2]


def build(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "csrc" / "build.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def test_it_compiles_for_ampere_and_hopper_without_spills(tmp_path: Path) -> None:
    library = tmp_path / "made" / "library.so"
    done = build("--arch", "80", "90", "--out", str(library), "--verbose")
    if "no CUDA compiler" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    for arch in (80, 90):
        assert f"for 'sm_{arch}'" in done.stdout
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stdout)
    assert len(spills) >= done.stdout.count("Compiling entry function") > 0
    assert set(spills) == {("0", "0", "0")}
    assert load_library(library).tbcm_fused_chunk() % 4 == 0  # loads without a GPU
    assert list(library.parent.iterdir()) == [library]


def test_without_a_compiler_it_says_so_in_a_line(tmp_path: Path) -> None:
    done = build("--out", str(tmp_path / "library.so"), CUDA_HOME=str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no CUDA compiler")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_failed_compilation_leaves_the_old_library(tmp_path: Path) -> None:
    library, toolkit = tmp_path / "library.so", tmp_path / "toolkit" / "bin"
    library.write_text("old")
    toolkit.mkdir(parents=True)
    (toolkit / "nvcc").write_text("#!/bin/sh\necho no such architecture >&2\nexit 1\n")
    (toolkit / "nvcc").chmod(0o755)
    done = build("--arch", "1", "--out", str(library), CUDA_HOME=str(toolkit.parent))
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "no such architecture"
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert library.read_text() == "old"
