"""Every kernel is compiled for real GPUs, on a machine without one."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tbcm_kernels
from tbcm_kernels.registry import OPERATORS

FOLDER = Path(tbcm_kernels.__file__).parent


def compiled(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one may interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(FOLDER.parent)
    command = [sys.executable, "-m", "tbcm_kernels.ahead", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def kernels_in_the_source() -> set[str]:
    found = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                found.add(node.name)
    return found


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_kernel_compiles_for_sm_80_and_sm_90(dtype: str) -> None:
    done = compiled("--arch", "80", "90", "--dtype", dtype, "--model", "sana-600m", "flux")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    for arch in ("80", "90"):
        assert {row[1] for row in rows if row[4] == arch} == kernels_in_the_source()
    assert {row[0] for row in rows} == set(OPERATORS)
    assert max(float(row[5]) for row in rows) <= 160  # KiB of shared memory: an A100 has 164 for a block
    if dtype == "bf16":  # bytes of a thread that registers do not hold
        assert max(int(row[8]) for row in rows if row[4] == "90") == 0
        assert max(int(row[8]) for row in rows) <= 128


def test_interpreted_kernels_are_not_compiled() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(FOLDER.parent)}
    command = [sys.executable, "-m", "tbcm_kernels.ahead"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1 is set" in done.stderr.splitlines()[-1]
