from __future__ import annotations

import logging
import runpy

import pytest
import torch
from tbcm_kernels import dispatch
from tbcm_kernels.launch import jit, launch, tl, wide
from torch import Tensor

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")


@jit
def scale_kernel(x, y, size, factor, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < size, other=0.0).to(WIDE)
    tl.store(y + i, value * factor, mask=i < size)


def doubled(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    launch(scale_kernel, (-(-x.numel() // 16),), x, y, x.numel(), 2.0, WIDE=wide(x.dtype), BLOCK=16)
    return y


@pytest.mark.parametrize("size", [0, 1, 16, 37])
def test_a_launch_covers_all_and_nothing_of_an_empty_tensor(kernels: torch.device, size: int) -> None:
    x = torch.randn(size, device=kernels)
    assert torch.equal(doubled(x), 2 * x)


def test_tensors_of_a_cpu_take_the_reference() -> None:
    x = torch.ones(3)
    assert not dispatch.fused("test", x)
    with dispatch.using("off"):
        assert not dispatch.fused("test", x)


@ON_CPU
@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [("3.6.0", "2.4.0", False), ("3.6.0", "2.3.5", True), ("3.6.1", "3.0.0rc1", False), ("3.9.0", "2.4.6", True)],
)
def test_an_interpreter_that_cannot_work_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, triton: str, numpy: str, works: bool
) -> None:
    monkeypatch.setattr("triton.__version__", triton)
    monkeypatch.setattr("numpy.__version__", numpy)
    if works:
        with dispatch.using("interpret"):
            return
    with pytest.raises(ValueError, match=r"numpy<2\.4 \(see constraints-cuda\.txt\)"), dispatch.using("interpret"):
        pass


@ON_CPU
def test_interpreted_ones_take_the_kernel_but_for_those_left_out(kernels: torch.device) -> None:
    x = torch.ones(3)
    assert dispatch.fused("test", x, None)
    with dispatch.without("test", "other"):
        assert not dispatch.fused("test", x) and not dispatch.fused("other", x)
        assert dispatch.fused("third", x)
    with dispatch.using("off"):
        assert not dispatch.fused("test", x)
    assert dispatch.fused("test", x)


def test_under_forward_differentiation_pytorch_differentiates(kernels: torch.device) -> None:
    """A custom operator's tangent would be zero there: no error, a wrong number."""

    def cube(x: Tensor) -> Tensor:
        return torch.full_like(x, torch.nan) if dispatch.fused("test", x) else x**3

    x, dx = torch.tensor([2.0], device=kernels), torch.tensor([1.0], device=kernels)
    assert cube(x).isnan()

    def slope(x: Tensor, dx: Tensor) -> Tensor:
        return torch.func.jvp(cube, (x,), (dx,))[1]

    for differentiate in (slope, torch.compile(slope, fullgraph=True, backend="aot_eager")):
        assert differentiate(x, dx).item() == 12.0


def test_what_has_no_kernel_is_said_once(kernels: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    def fused(x: Tensor) -> Tensor:
        return x + dispatch.fused("said_once", x, unsupported="heads of 7 channels")

    x = torch.zeros(2, device=kernels)
    with caplog.at_level(logging.WARNING, dispatch.__name__):
        for function in (torch.compile(fused, fullgraph=True, backend="aot_eager"), fused, fused):
            assert torch.equal(function(x), x)
    assert [record.getMessage() for record in caplog.records] == [
        "said_once: no kernel for heads of 7 channels; PyTorch's operators instead"
    ]


def test_an_unknown_dtype_takes_the_reference(kernels: torch.device) -> None:
    assert not dispatch.fused("test", torch.zeros(1, dtype=torch.float8_e4m3fn, device=kernels))


def test_the_environment_switches_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def imported() -> str:
        """The mode of a copy of the module, as the environment is now."""
        mode: str = runpy.run_path(dispatch.__file__)["mode"]()
        return mode

    monkeypatch.delenv("TBCM_KERNELS", raising=False)
    assert imported() == "on"
    monkeypatch.setenv("TBCM_KERNELS", "off")
    assert imported() == "off"
    monkeypatch.setenv("TBCM_KERNELS", "of")
    with pytest.raises(ImportError, match="has TBCM_KERNELS=of: it may be on or off"):
        imported()
