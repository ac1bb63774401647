from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tbcm.errors import UserError
from tbcm.models.fp8 import Fp8Linear, Fp8Pointwise, fp8_available, quantise_rows, relative_error, to_fp8
from tbcm.runtime.graphs import Graphed

HALF_STEP = 2**-4
"""Of 3 mantissa bits, relative to the number."""
HALF_SUBNORMAL_STEP = 2**-10
"""Numbers below 2^-6 are 2^-9 apart, in units of the scale."""
BF16 = 2**-8

GPU = torch.device("cuda")
needs_fp8 = pytest.mark.skipif(not fp8_available(GPU), reason="needs an NVIDIA GPU with fp8")


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(seed: int, inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias).requires_grad_(False)
    layer.weight.copy_(randn(seed, outputs, inputs) * inputs**-0.5)
    if bias:
        layer.bias.copy_(randn(seed + 1, outputs))
    return layer


def fp8(layer: nn.Linear) -> Fp8Linear:
    return Fp8Linear(layer.weight, layer.bias)


def rounding(x: Tensor) -> Tensor:
    """How far rounding to e4m3 with a scale per row may move each element, and a little for the fp32 division."""
    return 1.001 * (HALF_STEP * x.abs() + HALF_SUBNORMAL_STEP * x.abs().amax(-1, keepdim=True) / 448)


def assert_within_e4m3(layer: nn.Linear, x: Tensor, y: Tensor) -> None:
    """No element is further off than rounding both factors of each product, and the sum to bf16, allows."""
    exact = layer(x).double()
    x, w = x.double(), layer.weight.double()
    dx, dw = rounding(x), rounding(w)
    bound = dx @ w.abs().T + x.abs() @ dw.T + dx @ dw.T
    assert ((y.double() - exact).abs() <= bound + BF16 * (exact.abs() + bound)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_error_of_rows(dtype: torch.dtype) -> None:
    size = torch.logspace(-30, 30, 7)[:, None]
    x = (randn(0, 7, 5000) * torch.linspace(-25, 0, 5000).exp2() * size).to(dtype)  # rows and columns far apart
    values, scale = quantise_rows(x)
    assert (values.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (7, 1))
    back = values.double() * scale.double()
    assert ((back - x.double()).abs() <= rounding(x.double())).all()
    assert (values.float().abs().amax(-1) == 448).all()  # the whole range is used


def test_rows_of_zeros_stay_zero() -> None:
    values, scale = quantise_rows(torch.zeros(2, 16))
    assert (values.float() == 0).all()
    assert (fp8(linear(0, 16, 32, bias=False))(torch.zeros(2, 16)) == 0).all()
    assert scale.isfinite().all()


def test_a_bad_row_spoils_no_other() -> None:
    layer, x = fp8(linear(0, 32, 16)), randn(2, 3, 32)
    expected = layer(x)
    x[1, 5] = float("inf")
    y = layer(x)
    assert not y[1].isfinite().any()
    torch.testing.assert_close(y[[0, 2]], expected[[0, 2]], rtol=0, atol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_product_of_its_rounded_factors(bias: bool) -> None:
    exact = linear(0, 96, 48, bias)
    layer, x = fp8(exact), randn(2, 2, 5, 96)
    values, scale = quantise_rows(x)
    expected = (values.double() * scale) @ (layer.weight.double() * layer.scale.double().T).T
    if bias:
        expected += exact.bias
    torch.testing.assert_close(layer(x).double(), expected, rtol=1.01 * BF16, atol=BF16)
    assert_within_e4m3(exact, x, layer(x))


def test_error_of_a_random_linear() -> None:
    """m 2^e, 1 <= m < 2, is rounded to a multiple of 2^(e - 3): a root mean square error of 2^(e - 3) / sqrt(12), which
    relative to the number is at most 2^-3 / sqrt(12) and at least half of it. Both factors of each product have one."""
    worst = 2**0.5 * 2**-3 / 12**0.5  # 5.1 %
    layer, x = linear(0, 512, 256, bias=False), randn(2, 128, 512)
    assert worst / 2 < relative_error(layer(x), fp8(layer)(x)) < worst


def test_scale_of_rows_does_not_matter() -> None:
    """A token of large values takes no precision from the others, nor an output feature of large weights."""
    layer, x = linear(0, 64, 32, bias=False), randn(2, 4, 64)
    y = fp8(layer)(x)
    layer.weight[3] *= 2**20
    x[1] *= 2**15
    scaled = y.clone()
    scaled[:, 3] *= 2**20
    scaled[1] *= 2**15
    torch.testing.assert_close(fp8(layer)(x), scaled, rtol=0, atol=0)


def test_operands_are_what_the_gpu_kernel_demands() -> None:
    """Strides, shapes and dtypes, as torch._scaled_mm checks them for tensors on a GPU that hold no data."""
    with FakeTensorMode():
        layer = Fp8Linear(torch.empty(1024, 512, device=GPU), torch.empty(1024, device=GPU))
        transposed = torch.empty(1, 512, 48, device=GPU).mT
        for x in (torch.empty(2, 77, 512, device=GPU), transposed, torch.empty(1, 512, device=GPU).bfloat16()):
            y = layer(x)
            assert (y.shape, y.dtype, y.device.type) == ((*x.shape[:-1], 1024), x.dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_has_the_input_dtype(dtype: torch.dtype) -> None:
    y = fp8(linear(0, 32, 16))(randn(1, 2, 3, 32).to(dtype))
    assert (y.dtype, y.shape) == (dtype, (2, 3, 16))


def test_pointwise_convolution() -> None:
    conv = nn.Conv2d(32, 48, 1).requires_grad_(False)
    x = randn(0, 2, 32, 3, 5)
    y, exact = Fp8Pointwise(conv)(x), conv(x)
    assert y.shape == exact.shape
    assert relative_error(exact, y) < 0.06
    same_weights = nn.Linear(32, 48).requires_grad_(False)
    same_weights.weight.copy_(conv.weight.flatten(1))
    same_weights.bias.copy_(conv.bias)
    assert_within_e4m3(same_weights, x.movedim(1, -1), y.movedim(1, -1))


class Network(nn.Module):
    """Layers of all kinds that are replaced or not."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embed = nn.ModuleDict({"linear": nn.Linear(32, 64)})
        self.blocks = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(32, 64), "b": nn.Linear(64, 32)}) for _ in range(2)])
        self.narrow, self.odd = nn.Linear(32, 16), nn.Linear(32, 40)
        self.point, self.grouped = nn.Conv2d(32, 64, 1), nn.Conv2d(32, 64, 1, groups=2)
        self.strided, self.wide = nn.Conv2d(32, 64, 1, stride=2), nn.Conv2d(32, 64, 3)
        self.proj_out = nn.Linear(64, 32)


def test_large_layers_are_replaced() -> None:
    net = Network().requires_grad_(False)
    kept = {name: net.get_submodule(name) for name in ("time_embed.linear", "narrow", "odd", "grouped", "strided")}
    kept |= {"wide": net.wide, "proj_out": net.proj_out}
    replaced = to_fp8(net, smallest=32)
    blocks = [f"blocks.{i}.{side}" for i in range(2) for side in "ab"]
    assert replaced == dict.fromkeys([*blocks, "point"], 2048)
    assert all(type(net.get_submodule(name)) is Fp8Linear for name in blocks)
    assert type(net.point) is Fp8Pointwise
    assert all(net.get_submodule(name) is layer for name, layer in kept.items())


def test_names_to_skip_are_the_callers() -> None:
    net = Network().requires_grad_(False)
    replaced = to_fp8(net, skip=["blocks", "point"], smallest=32)
    assert list(replaced) == ["time_embed.linear", "proj_out"]


def test_refused_for_networks_that_train_or_are_small() -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\.a is not frozen"):
        to_fp8(Network(), smallest=32)
    with pytest.raises(UserError, match="at least 512"):
        to_fp8(Network().requires_grad_(False))


def test_refused_for_a_gpu_without_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Network().requires_grad_(False)
    monkeypatch.setattr(net, "parameters", lambda: iter([SimpleNamespace(device=GPU)]))
    monkeypatch.setattr("tbcm.models.fp8.fp8_available", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(UserError, match="not Tesla V100: use bf16"):
        to_fp8(net, smallest=32)


def test_relative_error() -> None:
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(0.1)
    assert not fp8_available(torch.device("cpu"))


@needs_fp8
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 77, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_kernel(dtype: torch.dtype, rows: int, bias: bool) -> None:
    """Row scales, odd numbers of rows, and shapes of Sana-0.6B: the same operands in the same product as on a CPU."""
    exact = linear(0, 1152, 2880, bias)
    layer, x = fp8(exact), randn(2, rows, 1152).to(dtype)
    y = layer.to(GPU)(x.to(GPU)).cpu()
    assert y.dtype == dtype
    assert_within_e4m3(exact, x.float(), y)
    assert relative_error(layer.cpu()(x), y) < 0.01  # fast accumulation
    assert relative_error(exact(x.float()), y) < 0.055


@needs_fp8
def test_gpu_inputs_of_other_strides() -> None:
    layer = fp8(linear(0, 512, 1024)).to(GPU)
    x = randn(1, 1, 512, 48).to(GPU)
    torch.testing.assert_close(layer(x.mT), layer(x.mT.contiguous()), rtol=0, atol=0)
    conv = nn.Conv2d(512, 1024, 1, device=GPU).requires_grad_(False)
    image = randn(2, 2, 512, 4, 6).to(GPU)
    assert relative_error(conv(image), Fp8Pointwise(conv)(image)) < 0.055


@needs_fp8
def test_gpu_layers_can_be_captured() -> None:
    layer = fp8(linear(0, 512, 1024)).to(GPU)
    graphed = Graphed(lambda tensors: (layer(tensors["x"]),), switch="teacher.cuda_graph=false")
    for seed in (1, 2):
        x = randn(seed, 64, 512).to(GPU)
        torch.testing.assert_close(graphed({"x": x})[0], layer(x), rtol=0, atol=0)


@needs_fp8
def test_gpu_autocast_and_compile(fresh_compiler: None) -> None:
    exact = linear(0, 512, 1024).to(GPU)
    layer, x = fp8(exact), randn(1, 64, 512).to(GPU)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        y, compiled = layer(x), torch.compile(layer, fullgraph=True)(x)
    assert y.dtype == compiled.dtype == torch.float32
    assert relative_error(exact(x), y) < 0.055
    assert relative_error(exact(x), compiled) < 0.055
