"""The kernels of gated_residual and residual_norm_modulate against the sums written out, differences and gradcheck."""

from __future__ import annotations

import pytest
import torch
from tbcm_kernels.catalog import Dual
from tbcm_kernels.gated_residual import (
    gated_residual,
    gated_residual_and_copy,
    norm_reference,
    reference,
    residual_norm_modulate,
)
from torch import Tensor

EPS = 1e-6
EXACT = torch.float64
WITHOUT = None, None


def arguments(
    samples: int, tokens: int, width: int, device: torch.device, *dtypes: torch.dtype
) -> tuple[Dual, Dual, Dual, Dual, Dual]:
    """h, x, gate, shift and scale with tangents; `dtypes` are those of h, of x and of the vectors, which are strided
    views as a block has them."""
    torch.manual_seed(0)
    h_dtype, x_dtype, table = dtypes or (EXACT, EXACT, EXACT)
    streams = [torch.randn(samples, tokens, width, dtype=EXACT, device=device) for _ in range(4)]
    vectors = torch.randn(samples, 6, width, dtype=EXACT, device=device).to(table).chunk(6, 1)
    h, x = ((streams[i].to(dtype), streams[i + 2].to(dtype)) for i, dtype in enumerate((h_dtype, x_dtype)))
    return h, x, *zip(vectors[:3], vectors[3:], strict=True)


def leaves(given: tuple[Dual, ...], dual: bool) -> list[Dual]:
    return [(value.detach().requires_grad_(), tangent if dual else None) for value, tangent in given]


def added(h: Tensor, gate: Tensor | None, x: Tensor) -> Tensor:
    return h + x if gate is None else h + gate * x


def normed(h: Tensor, x: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor) -> Tensor:
    centred = added(h, gate, x)
    centred = centred - centred.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + EPS).sqrt() * (1 + scale) + shift


def exact(kernels: torch.device) -> torch.device:
    """The device for fp64, which kernels take in the interpreter alone."""
    if kernels.type == "cuda":
        pytest.skip("fp64 kernels run in the interpreter")
    return kernels


def difference(function, given: list[Dual]) -> Tensor:  # type: ignore[no-untyped-def]
    """Central, along the tangents."""
    step = 1e-5
    ahead, behind = (
        function(*(None if v is None else v + sign * step * d for v, d in given)) for sign in (1, -1)
    )  # fmt: skip
    return (ahead - behind) / (2 * step)


SIZES = [(2, 3, 24), (1, 1, 7), (1, 4, 130), (0, 4, 8), (2, 0, 8)]


@pytest.mark.parametrize(("samples", "tokens", "width"), SIZES)
def test_sum(kernels: torch.device, samples: int, tokens: int, width: int) -> None:
    h, x, gate, *_ = arguments(samples, tokens, width, exact(kernels))
    y, dy = gated_residual(h, gate, x)
    torch.testing.assert_close(y, added(h[0], gate[0], x[0]))
    torch.testing.assert_close(dy, difference(added, [h, gate, x]), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(("samples", "tokens", "width"), SIZES)
@pytest.mark.parametrize("gated", [True, False])
def test_sum_and_norm(kernels: torch.device, samples: int, tokens: int, width: int, gated: bool) -> None:
    h, x, gate, shift, scale = arguments(samples, tokens, width, exact(kernels))
    gate = gate if gated else None
    (out, dout), (y, dy) = residual_norm_modulate(h, x, gate, shift, scale, EPS, EXACT)
    given = [h, x, gate or WITHOUT, shift, scale]
    torch.testing.assert_close(out, added(h[0], given[2][0], x[0]))
    torch.testing.assert_close(dout, difference(added, [h, given[2], x]), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(y, normed(*(value for value, _ in given)))
    torch.testing.assert_close(dy, difference(normed, given), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dual", [False, True])
def test_gradients_of_the_sum(kernels: torch.device, dual: bool) -> None:
    h, x, gate, *_ = leaves(arguments(2, 3, 5, exact(kernels)), dual)
    duals = h, gate, x

    def value(*values: Tensor) -> Tensor:
        return gated_residual(*((v, d) for v, (_, d) in zip(values, duals, strict=True)))[0]

    assert torch.autograd.gradcheck(value, [v for v, _ in duals], fast_mode=True)


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("used", ["both", "copy"])
def test_a_copy_of_the_sum(kernels: torch.device, used: str, dual: bool) -> None:
    """The same numbers, rounded; the gradients of both are added up."""
    h, x, gate, *_ = leaves(arguments(2, 3, 5, exact(kernels)), dual)
    values = [value for value, _ in (h, gate, x)]

    def gradients(y: Tensor, copy: Tensor) -> tuple[Tensor, ...]:
        loss = copy.square().sum() + (y.sin().sum() if used == "both" else 0)
        return torch.autograd.grad(loss, values)

    (y, dy), (copy, dcopy) = gated_residual_and_copy(h, gate, x, torch.float32)
    assert torch.equal(copy, y.float())
    if dual:
        assert torch.equal(dcopy, dy.float())
    expected = added(*values)
    torch.testing.assert_close(gradients(y, copy), gradients(expected, expected.float()), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("used", "gated", "dual"),
    [("both", True, True), ("both", True, False), ("both", False, False), ("sum", True, False), ("norm", False, True)],
)
def test_gradients_of_the_sum_and_norm(kernels: torch.device, used: str, gated: bool, dual: bool) -> None:
    """Also of one of the two alone."""
    h, x, gate, shift, scale = leaves(arguments(2, 2, 5, exact(kernels)), dual)
    duals = [h, x, shift, scale, *([gate] if gated else [])]

    def values(*values: Tensor) -> tuple[Tensor, ...]:
        h, x, shift, scale, *gates = ((v, d) for v, (_, d) in zip(values, duals, strict=True))
        out, y = residual_norm_modulate(h, x, gates[0] if gates else None, shift, scale, EPS, EXACT)
        return {"both": (out[0], y[0]), "sum": out[:1], "norm": y[:1]}[used]

    assert torch.autograd.gradcheck(values, [v for v, _ in duals], fast_mode=True)


@pytest.mark.parametrize(("samples", "tokens", "width"), [(2, 70, 130), (0, 4, 8), (2, 0, 8)])
def test_gradients_of_the_sum_of_many_tokens(kernels: torch.device, samples: int, tokens: int, width: int) -> None:
    """More than a program takes, and none."""
    results = []
    for function in (gated_residual, reference):
        h, x, gate, *_ = leaves(arguments(samples, tokens, width, exact(kernels)), dual=False)
        loss = function(h, gate, x)[0].square().sum()
        results.append(torch.autograd.grad(loss, [value for value, _ in (h, x, gate)]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("samples", "tokens", "width"), [(2, 18, 24), (0, 4, 8), (2, 0, 8)])
@pytest.mark.parametrize("gated", [True, False])
def test_gradients_of_the_norm_of_many_tokens(
    kernels: torch.device, samples: int, tokens: int, width: int, gated: bool
) -> None:
    """More than a program takes, and none."""
    results = []
    for function in (residual_norm_modulate, norm_reference):
        h, x, gate, shift, scale = leaves(arguments(samples, tokens, width, exact(kernels)), dual=False)
        out, y = function(h, x, gate if gated else None, shift, scale, EPS, EXACT)
        loss = (out[0] * torch.arange(width, device=kernels)).sum() + y[0].square().sum()
        values = [value for value, _ in (h, x, shift, scale, *([gate] if gated else []))]
        results.append(torch.autograd.grad(loss, values))
    torch.testing.assert_close(*results)


# Of a value below 8: bf16 is spaced by 2^-5 there, fp16 by 2^-8. Triton's interpreter truncates to bf16.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 8e-2, torch.float16: 8e-3}
MIXTURES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),  # under autocast
    (torch.float32, torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),  # a frozen network
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float16, torch.float16, torch.float16),
]


@pytest.mark.parametrize("dtypes", MIXTURES)
@pytest.mark.parametrize("gated", [True, False])
def test_dtypes(kernels: torch.device, dtypes: tuple[torch.dtype, ...], gated: bool) -> None:
    """h' has h's dtype, the norm that of x here, and gradients those of their inputs."""
    given = arguments(2, 2, 72, kernels, *dtypes)
    results = []
    for exactly in (False, True):
        h, x, gate, shift, scale = leaves(
            tuple((v.to(EXACT), d.to(EXACT)) if exactly else (v, d) for v, d in given), dual=True
        )  # fmt: skip
        add, add_and_norm = (reference, norm_reference) if exactly else (gated_residual, residual_norm_modulate)
        first = add(h, gate, x)
        dtype = EXACT if exactly else dtypes[1]
        out, y = add_and_norm(first, x, gate if gated else None, shift, scale, EPS, dtype)
        values = [value for value, _ in (h, x, gate, shift, scale)]
        gradients = torch.autograd.grad(out[0].sum() + y[0].sum(), values)
        assert [gradient.dtype for gradient in gradients] == [value.dtype for value in values]
        assert [t.dtype for t in (*first, *out, *y)] == [h[0].dtype] * 4 + [dtype] * 2
        results.append([*first, *out, *y, *gradients])
    atol = max(TOLERANCES[dtype] for dtype in dtypes)
    for value, other in zip(*results, strict=True):
        torch.testing.assert_close(value, other, atol=2 * atol, rtol=2 * atol, check_dtype=False)


def test_what_cannot_be_held_is_infinite_and_not_nan(kernels: torch.device) -> None:
    """As in the reference: in fp16 a sum beyond 65504 is infinite; a row of zeros and large rows have a norm."""
    h, x, gate, *_ = arguments(1, 2, 24, kernels, torch.float16, torch.float16, torch.float16)
    y, _ = gated_residual((torch.full_like(h[0], 6e4), None), (torch.ones_like(gate[0]), None), (x[0] * 0 + 6e4, None))
    assert (y == float("inf")).all()
    h, x, gate, shift, scale = arguments(1, 2, 24, kernels, torch.float32, torch.float32, torch.float32)
    for size in (0.0, 1e-30, 1e18):
        duals = (h[0] * size, h[1]), (x[0] * size, x[1]), gate, shift, scale
        out, y = residual_norm_modulate(*duals, EPS, torch.float32)
        assert all(t.isfinite().all() for t in (*out, *y))


@pytest.mark.parametrize("gated", [True, False])
def test_runs_repeat_and_the_dual_has_the_plain_values(kernels: torch.device, gated: bool) -> None:
    given = arguments(1, 18, 130, kernels, torch.float32, torch.bfloat16, torch.float32)

    def results(dual: bool) -> list[Tensor]:
        h, x, gate, shift, scale = leaves(given, dual)
        out, y = residual_norm_modulate(
            gated_residual(h, gate, x), x, gate if gated else None, shift, scale, EPS, torch.bfloat16
        )  # fmt: skip
        values = [value for value, _ in (h, x, gate, shift, scale)]
        return [out[0], y[0], *torch.autograd.grad(out[0].square().sum() + y[0].float().square().sum(), values)]

    once, again, without = results(True), results(True), results(False)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(once, again, without, strict=True))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(kernels: torch.device, gated: bool) -> None:
    given = arguments(2, 3, 24, kernels, torch.float32, torch.bfloat16, torch.float32)

    def step(*values: Tensor) -> tuple[Tensor, ...]:
        h, x, gate, shift, scale = ((value, tangent) for value, (_, tangent) in zip(values, given, strict=True))
        first = gated_residual(h, gate, x)
        out, y = residual_norm_modulate(first, x, gate if gated else None, shift, scale, EPS, torch.bfloat16)
        return *out, *y

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        values = [value for value, _ in leaves(given, dual=False)]
        out, dout, y, dy = function(*values)
        assert not dout.requires_grad and not dy.requires_grad
        gradients = torch.autograd.grad(out.square().sum() + y.float().square().sum(), values)
        results.append([out.detach(), dout, y.detach(), dy, *gradients])
    torch.testing.assert_close(*results, atol=0, rtol=0)


def test_forward_mode_is_right(kernels: torch.device) -> None:
    """torch.func.jvp takes the reference, whose tangent is not zero."""
    given = arguments(2, 3, 24, kernels)

    def values(*values: Tensor) -> tuple[Tensor, Tensor]:
        h, x, gate, shift, scale = ((value, None) for value in values)
        out, y = residual_norm_modulate(gated_residual(h, gate, x), x, gate, shift, scale, EPS, EXACT)
        return out[0], y[0]

    primals, tangents = zip(*given, strict=True)
    values_jvp, tangents_jvp = torch.func.jvp(values, primals, tangents)
    h, x, gate, shift, scale = given
    out, y = norm_reference(reference(h, gate, x), x, gate, shift, scale, EPS, EXACT)
    torch.testing.assert_close((values_jvp, tangents_jvp), ((out[0], y[0]), (out[1], y[1])))
