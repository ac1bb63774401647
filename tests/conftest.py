"""Fixtures that several tests share."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may ask a hub, which may be out of reach: retries take half a minute
if torch.cuda.is_available():
    torch.backends.cudnn.allow_tf32 = False  # references in fp32 are what kernels are compared with
else:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from tbcm_kernels import dispatch

LONGEST = "tests/distributed/", "tests/bench/", "tests/kernels/test_ahead", "tests/test_fake_cuda", "tests/test_command"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that take longest begin first, so that no worker has one left when the others are done."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test printed may have names of files in it that are no UTF-8; pytest-xdist cannot send those."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture
def double_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps fp64 tensors fp64 where diffusers computes in fp32 (time embedding, RMSNorm, linear attention).

    Without it a finite difference through such a layer agrees with a derivative to 1e-3 only.
    """
    to, to_float = torch.Tensor.to, torch.Tensor.float

    def keep_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.dtype == torch.float64 and torch.float32 in (kwargs.get("dtype"), *args):
            return self
        return to(self, *args, **kwargs)

    def keep_float(self: torch.Tensor) -> torch.Tensor:
        return self if self.dtype == torch.float64 else to_float(self)

    monkeypatch.setattr(torch.Tensor, "to", keep_to)
    monkeypatch.setattr(torch.Tensor, "float", keep_float)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before the test, and its compiled functions forgotten after it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def kernels() -> Iterator[torch.device]:
    """The device on whose tensors operators run their kernels: a GPU, else the CPU with Triton's interpreter."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    if trouble := dispatch.interpreter_trouble():
        pytest.skip(trouble)
    with dispatch.using("interpret"):
        yield torch.device("cpu")
