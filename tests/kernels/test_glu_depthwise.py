"""Mix-FFN's middle against fp64 mathematics: values, gradients, tangents, odd shapes, extremes, dtypes, compiled."""

from __future__ import annotations

import pytest
import torch
from tbcm_kernels import glu_depthwise_backward as backward
from tbcm_kernels.glu_depthwise import OPERATOR, glu_depthwise, reference
from torch import Tensor
from torch.nn.functional import pad

Shape = tuple[int, int, int, int]
"""Samples, rows, columns, C."""
Arguments = tuple[Tensor, Tensor, Tensor, Tensor]
"""x, its tangent, weight, bias."""

# Of a warp: one token; one row; more rows than a band, one column; columns beside the strip; channels beside the block.
SHAPES = [(1, 1, 1, 1), (2, 1, 3, 2), (1, 9, 1, 2), (1, 2, 9, 3), (1, 1, 2, 33), (0, 2, 3, 4)]
SMALL: Shape = (1, 2, 2, 3)


def draw(shape: Shape, device: torch.device, dtype: torch.dtype = torch.float64) -> Arguments:
    """With parameters in fp32 where the activations are in half precision, as under autocast."""
    samples, rows, columns, channels = shape
    generator = torch.Generator().manual_seed(0)
    x, tx = torch.randn(2, samples, rows * columns, 2 * channels, generator=generator, dtype=torch.float64)
    weight = torch.randn(2 * channels, 1, 3, 3, generator=generator, dtype=torch.float64) / 3
    bias = torch.randn(2 * channels, generator=generator, dtype=torch.float64)
    wide = torch.promote_types(dtype, torch.float32)
    x, tx, weight, bias = x.to(device, dtype), tx.to(device, dtype), weight.to(device, wide), bias.to(device, wide)
    return x.requires_grad_(), tx, weight.requires_grad_(), bias.requires_grad_()


def mathematics(x: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int]) -> Tensor:
    """d[r, c] = bias + sum w[i, j] s[r + i - 1, c + j - 1], written out on a padded grid."""
    rows, columns = size
    s = pad((x / (1 + torch.exp(-x))).unflatten(1, size), (0, 0, 1, 1, 1, 1))
    d = torch.stack([weight[:, 0, i, j] * s[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]).sum(
        0
    )
    a, b = (d if bias is None else d + bias).chunk(2, -1)
    return (a * b / (1 + torch.exp(-b))).flatten(1, 2)


def pushed(x: Tensor, tx: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return torch.func.jvp(lambda x: mathematics(x, weight, bias, size), (x,), (tx,))


@pytest.mark.parametrize("shape", SHAPES)
def test_value_tangent_and_gradients_are_the_mathematics(kernels: torch.device, shape: Shape) -> None:
    x, tx, weight, bias = draw(shape, kernels)
    expected = pushed(x, tx, weight, bias, shape[1:3])
    y, ty = glu_depthwise((x, tx), weight, bias, shape[1:3])
    torch.testing.assert_close((y, ty), expected)
    assert ty is not None and not ty.requires_grad
    if kernels.type == "cpu":  # on a card fp64 takes the reference, whose layout is PyTorch's choice
        assert y.is_contiguous() and ty.is_contiguous()
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(expected[0], (x, weight, bias), dy)
    torch.testing.assert_close(torch.autograd.grad(y, (x, weight, bias), dy), wanted)


def test_reference_is_the_mathematics() -> None:
    for shape in SHAPES:
        x, tx, weight, bias = draw(shape, torch.device("cpu"))
        for b in (bias, None):
            expected = pushed(x, tx, weight, b, shape[1:3])
            answer = reference((x, tx), weight, b, shape[1:3])
            torch.testing.assert_close(answer, expected)
            torch.testing.assert_close(reference((x, None), weight, b, shape[1:3])[0], expected[0])
            wanted = torch.autograd.grad(expected[0].sum(), (x, weight))
            torch.testing.assert_close(torch.autograd.grad(answer[0].sum(), (x, weight)), wanted)


def test_without_a_tangent_value_and_gradients_have_the_same_bits_run_after_run(kernels: torch.device) -> None:
    x, tx, weight, bias = draw(SMALL, kernels, torch.float32)
    runs = []
    for tangent in (None, tx, tx):
        y, ty = glu_depthwise((x, tangent), weight, bias, SMALL[1:3])
        assert (ty is None) == (tangent is None)
        runs.append((y, *torch.autograd.grad(y.sum(), (x, weight, bias))))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_without_a_bias_and_with_strided_arguments(kernels: torch.device) -> None:
    x, tx, weight, _ = draw(SMALL, kernels)
    expected = pushed(x, tx, weight, None, SMALL[1:3])
    y, ty = glu_depthwise((x.mT.contiguous().mT, tx.mT.contiguous().mT), weight, None, SMALL[1:3])
    torch.testing.assert_close((y, ty), expected)
    dy = torch.ones((), dtype=y.dtype, device=y.device).expand_as(y)
    wanted = torch.autograd.grad(expected[0], (x, weight), dy)
    torch.testing.assert_close(torch.autograd.grad(y, (x, weight), dy), wanted)


def test_programs_of_several_samples_add_up_the_weights_gradient(
    kernels: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backward, "_PROGRAMS", 2)  # of 3 samples: 2 and 1
    shape = 3, 2, 1, 2
    x, _, weight, bias = draw(shape, kernels)
    y, _ = glu_depthwise((x, None), weight, bias, (2, 1))
    wanted = torch.autograd.grad(mathematics(x, weight, bias, (2, 1)).sum(), (x, weight, bias))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), (x, weight, bias)), wanted)


def test_tangent_is_the_finite_difference(kernels: torch.device) -> None:
    x, tx, weight, bias = (t.detach() for t in draw(SMALL, kernels))
    _, ty = glu_depthwise((x, tx), weight, bias, SMALL[1:3])
    ahead, behind = (glu_depthwise((x + h * tx, None), weight, bias, SMALL[1:3])[0] for h in (1e-5, -1e-5))
    torch.testing.assert_close(ty, (ahead - behind) / 2e-5, rtol=1e-7, atol=1e-8)


# Half precision rounds what is computed in fp32 once (Triton's interpreter cuts bf16 off: 2**-7); sums of dw are fp32.
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_precisions_against_fp64(kernels: torch.device, dtype: torch.dtype, rtol: float) -> None:
    shape = (2, 32, 32, 290) if kernels.type == "cuda" else (1, 2, 4, 3)
    x, tx, weight, bias = draw(shape, kernels, dtype)
    y, ty = glu_depthwise((x, tx), weight, bias, shape[1:3])
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, (x, weight, bias), dy)
    assert [t.dtype for t in (y, ty, *gradients)] == [dtype, dtype, dtype, weight.dtype, bias.dtype]
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    z, tz = pushed(exact[0], tx.double(), exact[1], exact[2], shape[1:3])
    wanted = torch.autograd.grad(z, exact, dy.double())
    for got, want, tolerance in zip((y, ty, *gradients), (z, tz, *wanted), (rtol, rtol, rtol, 1e-4, 1e-4), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_values_stay_finite_where_they_do_in_the_reference(kernels: torch.device, dtype: torch.dtype) -> None:
    x, tx, weight, bias = draw((1, 2, 2, 4), kernels, dtype)
    with torch.no_grad():
        x.copy_(torch.tensor([0, -1e4, 1e4, -90, 90, -3e38, 1e-38, -1e-38]).to(dtype))
        bias.copy_(torch.tensor([0, 0, 0, 0, -200, 100, -1e6, 0.0]))
        weight.abs_()
    y, ty = glu_depthwise((x, tx), weight, bias, (2, 2))
    z, tz = reference((x.float(), tx.float()), weight, bias, (2, 2))
    tolerance = {"rtol": 2**-6, "atol": 1e-6}
    torch.testing.assert_close(y.float(), z, **tolerance)
    torch.testing.assert_close(ty.float(), tz, **tolerance)
    assert z.isfinite().all()
    for got, want in zip(*(torch.autograd.grad(out.sum(), (x, weight, bias)) for out in (y, z)), strict=True):
        torch.testing.assert_close(got, want, rtol=2**-5, atol=1e-3)


def test_compiled_is_eager(kernels: torch.device, fresh_compiler: None) -> None:
    x, tx, weight, bias = draw((1, 1, 2, 2), kernels, torch.float32)

    def step(x: Tensor, tx: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, ty = glu_depthwise((x * 2, tx * 2), weight, bias, (1, 2))
        assert ty is not None
        return y, ty, glu_depthwise((x, None), weight, bias, (1, 2))[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    answers = []
    for run in (step, compiled):
        y, ty, z = run(x, tx, weight, bias)
        assert not ty.requires_grad and ty.abs().sum() > 0
        answers.append((y, ty, z, *torch.autograd.grad((y * z).sum(), (x, weight, bias))))
    torch.testing.assert_close(answers[1], answers[0], rtol=0, atol=0)


def test_forward_mode_differentiation_takes_the_reference(kernels: torch.device) -> None:
    x, tx, weight, bias = (t.detach() for t in draw(SMALL, kernels))
    answer = torch.func.jvp(lambda x: glu_depthwise((x, None), weight, bias, SMALL[1:3])[0], (x,), (tx,))
    torch.testing.assert_close(answer, pushed(x, tx, weight, bias, SMALL[1:3]))


def test_shapes_that_do_not_agree_are_refused(kernels: torch.device) -> None:
    x, tx, weight, bias = draw(SMALL, kernels)
    with pytest.raises(ValueError, match="over a grid of"):
        glu_depthwise((x, tx), weight, bias, (2, 3))
    with pytest.raises(ValueError, match="bias"):
        glu_depthwise((x, tx), weight, bias[:2], SMALL[1:3])


def test_cost_counts_every_tensor_once() -> None:
    x, tx, weight, bias = draw(SMALL, torch.device("cpu"), torch.bfloat16)
    parameters = weight.nbytes + bias.nbytes
    assert OPERATOR.cost((x, None), weight, bias, SMALL[1:3]).bytes == x.nbytes * 3 // 2 + parameters
    assert OPERATOR.cost((x, tx), weight, bias, SMALL[1:3]).bytes == 3 * x.nbytes + parameters
    assert OPERATOR.backward_cost is not None
    assert OPERATOR.backward_cost((x, tx), weight, bias, SMALL[1:3]).bytes == x.nbytes * 5 // 2 + 2 * parameters
