"""The kernel of norm_modulate against LayerNorm written out, finite differences and gradcheck."""

from __future__ import annotations

import pytest
import torch
from tbcm_kernels import dispatch
from tbcm_kernels.catalog import Dual
from tbcm_kernels.norm_modulate import norm_modulate, reference, stream_and_norm
from torch import Tensor

EPS = 1e-6
EXACT = torch.float64


def expected(x: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS) -> Tensor:
    """From the definition, in fp64."""
    x, shift, scale = (tensor.to(EXACT) for tensor in (x, shift, scale))
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    deviation = ((centred**2).sum(-1, keepdim=True) / x.shape[-1] + eps) ** 0.5
    return centred / deviation * (1 + scale) + shift


def chunks(samples: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Vectors [B, 1, D] as a block has them: strided views."""
    return torch.randn(samples, 6, width, dtype=dtype, device=device).chunk(6, 1)


def arguments(
    samples: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype = EXACT, table: torch.dtype = EXACT
) -> tuple[Dual, Dual, Dual]:
    torch.manual_seed(0)
    shift, scale, dshift, dscale, *_ = chunks(samples, width, table, device)
    x, dx = (torch.randn(samples, tokens, width, dtype=dtype, device=device) for _ in range(2))
    return (x, dx), (shift, dshift), (scale, dscale)


def plain(arguments: tuple[Dual, ...]) -> list[Dual]:
    return [(value, None) for value, _ in arguments]


def exact(kernels: torch.device) -> torch.device:
    """The device for fp64, which kernels take in the interpreter alone."""
    if kernels.type == "cuda":
        pytest.skip("fp64 kernels run in the interpreter")
    return kernels


SIZES = [(2, 3, 24), (1, 1, 7), (1, 4, 130), (3, 1, 1), (0, 4, 8), (2, 0, 8)]


@pytest.mark.parametrize(("samples", "tokens", "width"), SIZES)
def test_values_and_tangents(kernels: torch.device, samples: int, tokens: int, width: int) -> None:
    x, shift, scale = arguments(samples, tokens, width, exact(kernels))
    y, dy = norm_modulate(x, shift, scale, EPS, EXACT)
    torch.testing.assert_close(y, expected(x[0], shift[0], scale[0]))
    step = 1e-5
    ahead, behind = (expected(*(v + sign * step * d for v, d in (x, shift, scale))) for sign in (1, -1))
    if width > 1:  # of one column the norm is 0 whatever it is
        torch.testing.assert_close(dy, (ahead - behind) / (2 * step), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("samples", "tokens", "width"), [(2, 3, 6), (1, 1, 7)])
@pytest.mark.parametrize("dual", [False, True])
def test_gradients(kernels: torch.device, samples: int, tokens: int, width: int, dual: bool) -> None:
    given = arguments(samples, tokens, width, exact(kernels))
    tangents = [tangent if dual else None for _, tangent in given]

    def normed(*values: Tensor) -> Tensor:
        return norm_modulate(*zip(values, tangents, strict=True), EPS, EXACT)[0]

    values = [value.detach().requires_grad_() for value, _ in given]
    assert torch.autograd.gradcheck(normed, values, fast_mode=True)


@pytest.mark.parametrize("dual", [False, True])
def test_gradients_of_tokens_that_go_on_are_added(kernels: torch.device, dual: bool) -> None:
    given = arguments(2, 3, 6, exact(kernels))
    tangents = [tangent if dual else None for _, tangent in given]

    def both(*values: Tensor) -> tuple[Tensor, Tensor]:
        (x, dx), (y, _) = stream_and_norm(*zip(values, tangents, strict=True), EPS, EXACT)
        assert torch.equal(x, values[0]) and dx is tangents[0]
        return x.sin() + y, x

    values = [value.detach().requires_grad_() for value, _ in given]
    assert torch.autograd.gradcheck(both, values, fast_mode=True)


@pytest.mark.parametrize(("samples", "tokens", "width"), [(2, 18, 40), (0, 4, 8), (2, 0, 8)])
def test_gradients_of_many_tokens(kernels: torch.device, samples: int, tokens: int, width: int) -> None:
    """More than a program takes, and none."""
    results = []
    for function in (norm_modulate, reference):
        values = [value.detach().requires_grad_() for value, _ in arguments(samples, tokens, width, exact(kernels))]
        y, _ = function(*((value, None) for value in values), EPS, EXACT)
        results.append(torch.autograd.grad((y * torch.arange(width, device=y.device)).sum(), values))
    torch.testing.assert_close(*results)


# A value of 4 has a spacing of 2^-6 in bf16 and 2^-8 in fp16; Triton's interpreter truncates to bf16.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 4e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
def test_dtypes(kernels: torch.device, dtype: torch.dtype, table: torch.dtype) -> None:
    """Tokens and result in `dtype`, modulation in another."""
    given = arguments(2, 2, 72, kernels, dtype, table)
    values = [value.detach().requires_grad_() for value, _ in given]
    duals = list(zip(values, (tangent for _, tangent in given), strict=True))
    y, dy = norm_modulate(*duals, EPS, dtype)
    y.sum().backward()
    assert y.dtype == dy.dtype == dtype
    others = [value.detach().to(EXACT).requires_grad_() for value in values]
    y_exact, dy_exact = reference(
        *((o, d.to(EXACT)) for o, (_, d) in zip(others, given, strict=True)), EPS, EXACT
    )  # fmt: skip
    y_exact.sum().backward()
    atol = TOLERANCES[dtype]
    torch.testing.assert_close(y, y_exact, atol=atol, rtol=atol, check_dtype=False)
    torch.testing.assert_close(dy, dy_exact, atol=atol, rtol=atol, check_dtype=False)
    for value, other in zip(values, others, strict=True):
        assert value.grad.dtype == value.dtype
        atol = max(TOLERANCES[dtype], TOLERANCES[value.dtype])
        torch.testing.assert_close(value.grad, other.grad, atol=5 * atol, rtol=atol, check_dtype=False)


def test_output_narrower_than_tokens(kernels: torch.device) -> None:
    """As under autocast: the stream is fp32, what the next linear layer takes is bf16."""
    x, shift, scale = arguments(1, 3, 40, kernels, torch.float32, torch.float32)
    y, dy = norm_modulate(x, shift, scale, EPS, torch.bfloat16)
    assert y.dtype == dy.dtype == torch.bfloat16
    torch.testing.assert_close(
        y, expected(x[0], shift[0], scale[0]), atol=4e-2, rtol=1e-2, check_dtype=False
    )  # fmt: skip


@pytest.mark.parametrize("row", [0.0, 1e4 + 0.1, 1e-30, 1e18])
def test_extreme_rows(kernels: torch.device, row: float) -> None:
    """A row without variance has a norm of 0, however far from zero it is."""
    x, shift, scale = arguments(1, 2, 40, kernels, torch.float32, torch.float32)
    flat = torch.full_like(x[0], row).requires_grad_()
    y, dy = norm_modulate((flat, x[1]), shift, scale, EPS, torch.float32)
    y.sum().backward()
    if row < 1e18:
        torch.testing.assert_close(y, shift[0].expand_as(y), atol=2e-3, rtol=0)
    assert y.isfinite().all() and dy.isfinite().all() and flat.grad.isfinite().all()


def test_far_from_zero(kernels: torch.device) -> None:
    """The mean's own rounding does not show: rows of deviation 1 around 1000, whose values are spaced by 6e-5."""
    x, shift, scale = arguments(1, 4, 200, kernels, torch.float32, torch.float32)
    far = x[0] + 1000
    y, _ = norm_modulate((far, None), (shift[0], None), (scale[0], None), EPS, torch.float32)
    torch.testing.assert_close(y, expected(far, shift[0], scale[0]), atol=2e-4, rtol=0, check_dtype=False)


def test_runs_repeat_and_the_dual_has_the_plain_value(kernels: torch.device) -> None:
    def gradients(given: list[Dual]) -> list[Tensor]:
        values = [value.detach().requires_grad_() for value, _ in given]
        duals = [(value, tangent) for value, (_, tangent) in zip(values, given, strict=True)]
        y, _ = norm_modulate(*duals, EPS, torch.float32)
        return [y, *torch.autograd.grad(y.square().sum(), values)]

    given = arguments(1, 18, 130, kernels, torch.float32, torch.float32)
    once, again, without = gradients(list(given)), gradients(list(given)), gradients(plain(given))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(once, again, without, strict=True))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(kernels: torch.device, backend: str) -> None:
    given = arguments(2, 3, 24, kernels, torch.float32, torch.float32)

    def step(*values: Tensor) -> tuple[Tensor, Tensor]:
        tangents = (tangent for _, tangent in given)
        return norm_modulate(*zip(values, tangents, strict=True), EPS, torch.bfloat16)

    results = []
    for function in (step, torch.compile(step, backend=backend, fullgraph=True)):
        values = [value.detach().requires_grad_() for value, _ in given]
        y, dy = function(*values)
        assert not dy.requires_grad
        results.append([y.detach(), dy, *torch.autograd.grad(y.float().square().sum(), values)])
    torch.testing.assert_close(*results, atol=0, rtol=0)


def test_forward_mode_is_right(kernels: torch.device) -> None:
    """torch.func.jvp takes the reference, whose tangent is not zero."""
    given = arguments(2, 3, 24, kernels)

    def value(*values: Tensor) -> Tensor:
        return norm_modulate(*((value, None) for value in values), EPS, EXACT)[0]

    primals, tangents = zip(*given, strict=True)
    y, dy = torch.func.jvp(value, primals, tangents)
    y_dual, dy_dual = reference(*given, EPS, EXACT)
    torch.testing.assert_close((y, dy), (y_dual, dy_dual))


def test_what_the_kernel_does_not_take(kernels: torch.device) -> None:
    """One vector for all samples goes to the reference."""
    x, shift, scale = plain(arguments(2, 3, 24, kernels, torch.float32, torch.float32))
    first = [(value[:1], None) for value, _ in (shift, scale)]
    y, _ = norm_modulate(x, *first, EPS, torch.float32)
    with dispatch.using("off"):
        torch.testing.assert_close(y, norm_modulate(x, *first, EPS, torch.float32)[0], atol=0, rtol=0)
