"""Compiled code calls the kernels itself: what inductor writes for a GPU, as told without one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_on_cuda import Attention
from interpreted_code import module
from speed.block import StudentBlock

from tbcm.models.sana.network import _run_block

TESTS = Path(__file__).parent.parent
Found = dict[str, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    if torch.version.cuda is not None:
        pytest.skip("pretends a GPU to PyTorch's CPU build")
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("compiled")
    paths = os.pathsep.join(str(TESTS.parent / name) for name in (".", "kernels", "tests", "bench"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TESTS / "compiled_on_cuda.py"), str(folder)]
    subprocess.run(command, env=environment | {"PYTHONPATH": paths}, check=True)
    return json.loads((folder / "compiled.json").read_text())


def called(found: Found, part: str, *, backward: bool) -> Counter[str]:
    """How often each of this package's kernels is launched by the generated code, without the number in its name."""
    count: Counter[str] = Counter()
    for made in found[part]["modules"]:
        if made["backward"] is backward:
            for name, times in made["called"].items():
                if "_kernel" in name:
                    count[re.sub(r"_\d+$", "", name).lstrip("_")] += times
    return count


def test_a_compiled_block_launches_its_kernels_without_pytorchs_dispatch(found: Found) -> None:
    assert called(found, "block", backward=False) == {
        "norm_modulate_kernel": 2,  # one of them with the residual
        "scale_kernel": 1,
        "state_kernel": 1,
        "output_kernel": 1,
        "gated_residual_kernel": 2,
        "cross_attention_kernel": 1,
        "glu_depthwise_kernel": 1,
    }
    assert called(found, "block", backward=True) == {
        "norm_modulate_backward_kernel": 2,
        "query_backward_kernel": 1,
        "scale_backward_kernel": 1,
        "key_backward_kernel": 1,
        "gated_residual_backward_kernel": 2,
        "query_gradient_kernel": 1,
        "text_gradient_kernel": 1,
        "glu_depthwise_backward_kernel": 1,
        "sums_kernel": 1,  # of what its programs leave
    }
    written = Counter[str]()
    for made in found["block"]["modules"]:
        assert "torch.ops.tbcm." not in made["text"]
        written.update(made["called"])
    products = sum(times for name, times in written.items() if name in ("mm", "addmm", "bmm"))
    assert found["block"]["launches"] == written.total() - products  # nothing else is called


def test_so_does_attention_under_a_jvp(found: Found) -> None:
    assert called(found, "attention", backward=False) == {"attention_kernel": 1}
    assert called(found, "attention", backward=True) == {
        "attention_query_gradient_kernel": 1,
        "attention_key_gradient_kernel": 1,
    }
    assert all("torch.ops.tbcm." not in made["text"] for made in found["attention"]["modules"])


def test_so_do_the_operators_outside_networks(found: Found) -> None:
    forward, backward = (called(found, "operators", backward=backward) for backward in (False, True))
    kernels = "step_kernel", "direction_kernel", "normalise_kernel", "squares_kernel", "loss_kernel"
    assert forward == dict.fromkeys(kernels, 1)
    assert backward == {"gradient_kernel": 1}
    assert all("torch.ops.tbcm." not in made["text"] for made in found["operators"]["modules"])


def test_nothing_is_copied_for_fear_that_a_kernel_writes_to_it(found: Found) -> None:
    """PyTorch reads in a kernel what it writes to. Where it cannot, it says so, and copies every input first."""
    assert not found["complaints"]
    modules = [made for part in ("block", "attention", "operators") for made in found[part]["modules"]]
    names = [name for made in modules for name in made["called"]]
    assert not [name for name in names if "clone" in name]


def eager_block() -> StudentBlock:
    step = StudentBlock("tiny", 2, 1, 4, text=5, device="cpu")
    step.network._block = _run_block
    return step


@pytest.mark.parametrize(
    ("part", "eager", "tolerance"),
    [("block", eager_block, 0.06), ("attention", partial(Attention, device="cpu"), 1e-5)],
    ids=["block", "attention"],
)
def test_compiled_code_computes_what_the_eager_one_does(
    found: Found, kernels: torch.device, part: str, eager: Callable[[], StudentBlock | Attention], tolerance: float
) -> None:
    """Value, tangent and all gradients, to what bf16 leaves of a block: the generated code, run in the interpreter."""
    step = eager()
    given = step.tensors()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in given.items():
            spread, centre = (0.3, 0.0) if x.dim() > 1 else (0.1, 1.0 if "norm" in name else 0.0)
            if name != "bias":
                x.copy_(torch.randn(x.shape, generator=generator) * spread + centre)
        forward, backward = (module(made["text"]) for made in found[part]["modules"])
        of_forward, of_backward = found[part]["sources"]
        results = forward([given[name] for name in of_forward])
        gradients = backward([given[name] if name in given else results[int(name)] for name in of_backward])
    y, dy = step()
    compared = {"y": (results[0], y), "dy": (results[1], dy)}
    compared |= {n: (g, given[n].grad) for n, g in zip(of_forward, gradients, strict=True) if g is not None}
    assert len(compared) == 2 + sum(x.grad is not None for x in given.values())
    for name, (compiled, wanted) in compared.items():
        assert compiled is not None and wanted is not None
        assert (compiled.float() - wanted.float()).norm() < tolerance * wanted.float().norm(), name
