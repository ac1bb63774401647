"""The training step on a GPU, as far as it can be told without one: on fake CUDA tensors (see `pretended_cuda`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TESTS = Path(__file__).parent
STEPS = "fast", "lean", "published", "scm", "sprint", "adamw"
Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    if torch.version.cuda is not None:
        pytest.skip("pretends a GPU to PyTorch's CPU build")
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("steps")
    paths = os.pathsep.join(str(TESTS.parent / name) for name in (".", "kernels", "tests", "bench"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, str(TESTS / "fake_cuda_steps.py"), str(folder)],
        env=environment | {"PYTHONPATH": paths},
        check=True,
    )
    return json.loads((folder / "steps.json").read_text())


@pytest.mark.parametrize("case", STEPS)
def test_a_step_runs_on_one_device_and_reads_nothing_back(found: Found, case: str) -> None:
    step = found[case]
    assert step["error"] is None, step["error"]
    assert step["devices"] == ["cuda:0"]
    assert not step["reads"], "\n".join(f"{what}\n{stack}" for what, stack in step["reads"])


def test_every_read_is_seen_with_its_stack(found: Found) -> None:
    """.item(), four values of .tolist(), bool(), .cpu(), a blocking copy and a mask; not an asynchronous copy or a
    fill."""
    step = found["reads"]
    assert step["error"] is None, step["error"]
    names = [what for what, _ in step["reads"]]
    copies = ["_to_copy from cuda to cpu of (4,)", "_to_copy from cpu to cuda of (4,)"]
    assert names == ["_local_scalar_dense"] * 6 + copies + ["index"]
    assert "x.sum().item()" in step["reads"][0][1]
