"""Linear attention: kernel against fp64 mathematics, gradients, tangents, odd shapes, extremes, dtypes, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tbcm_kernels import dispatch
from tbcm_kernels.catalog import Size
from tbcm_kernels.linear_attention import OPERATOR, linear_attention, reference
from torch import Tensor
from torch.nn.functional import relu, rms_norm

EPS = 1e-5

# (B, T, heads, d): a token; a block and a token; columns below a power of two; two chunks; many samples; none; nothing.
SHAPES = [(1, 1, 1, 16), (1, 65, 1, 32), (2, 9, 3, 20), (1, 260, 1, 16), (3, 2, 1, 17), (0, 4, 2, 16), (2, 0, 1, 16)]


def draw(
    shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """q, k, v; their tangents; the norms' weights, of both signs and zero."""
    batch, tokens, heads, dim = shape
    generator = torch.Generator().manual_seed(0)
    size = batch, tokens, heads * dim
    drawn = [torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(6)]
    weights = [torch.randn(heads * dim, generator=generator, dtype=torch.float64).to(device) for _ in range(2)]
    for weight in weights:
        weight[3] = 0
    return drawn[:3], drawn[3:], [w if dtype == torch.float64 else w.float() for w in weights]


def like(y: Tensor) -> Tensor:
    """A gradient of y."""
    drawn = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return drawn.to(y.device, y.dtype)


def mathematics(q: Tensor, k: Tensor, v: Tensor, norm_q: Tensor | None, norm_k: Tensor | None, heads: int) -> Tensor:
    """All weights of all pairs of tokens."""
    if norm_q is not None:
        q = rms_norm(q, q.shape[-1:], norm_q, EPS)
    if norm_k is not None:
        k = rms_norm(k, k.shape[-1:], norm_k, EPS)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = relu(q) @ relu(k).mT
    return (weights @ v / (weights.sum(-1, keepdim=True) + 1e-15)).transpose(1, 2).flatten(-2)


def run(values: list[Tensor], tangents: list[Tensor] | None, norms: Any, heads: int, dtype: torch.dtype) -> Any:
    return linear_attention(side_by_side(values, tangents), *norms, EPS, heads, dtype)


def side_by_side(values: list[Tensor], tangents: list[Tensor] | None) -> tuple[Tensor, Tensor | None]:
    return torch.cat(values, -1), None if tangents is None else torch.cat(tangents, -1)


@pytest.mark.parametrize("normed", [(True, True), (False, False), (True, False), (False, True)])
def test_value_tangent_and_gradients_are_the_mathematics(kernels: torch.device, normed: tuple[bool, bool]) -> None:
    for shape in SHAPES if all(normed) else SHAPES[:1]:
        heads = shape[2]
        values, tangents, weights = draw(shape, kernels)
        norms = [w if wanted else None for w, wanted in zip(weights, normed, strict=True)]
        leaves = [x.requires_grad_() for x in (*values, *norms) if x is not None]
        expected, t_expected = torch.func.jvp(
            lambda *x: mathematics(*x, *norms, heads),  # noqa: B023
            tuple(values),
            tuple(tangents),
        )
        y, dy = run(values, tangents, norms, heads, torch.float64)
        torch.testing.assert_close((y, dy), (expected, t_expected))
        assert not dy.requires_grad and y.is_contiguous() and dy.is_contiguous()
        g = like(y)
        wanted = torch.autograd.grad(expected, leaves, g)
        torch.testing.assert_close(torch.autograd.grad(y, leaves, g), wanted)


def test_gradients_agree_with_finite_differences(kernels: torch.device) -> None:
    """Of the plain operator, in a random direction."""
    values, _, norms = draw((1, 2, 2, 16), kernels)
    leaves = [x.requires_grad_() for x in (*values, *norms)]
    function = lambda q, k, v, nq, nk: run([q, k, v], None, (nq, nk), 2, torch.float64)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_the_tangent_agrees_with_finite_differences(kernels: torch.device) -> None:
    values, tangents, norms = draw((1, 20, 2, 16), kernels)
    _, tangent = run(values, tangents, norms, 2, torch.float64)
    step = 1e-6
    ahead, behind = (
        run([x + sign * step * dx for x, dx in zip(values, tangents, strict=True)], None, norms, 2, torch.float64)[0]
        for sign in (1, -1)
    )
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("dtype", "out", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        # Half-precision inputs are exact here: keys rounded to tf32 remain, each by less than 2^-12.
        (torch.bfloat16, torch.float32, 5e-4),
        (torch.float16, torch.float32, 5e-4),
        (torch.bfloat16, torch.bfloat16, 2**-7),
        (torch.float16, torch.float16, 2**-10),
    ],
)
def test_every_dtype_is_near_fp64(
    kernels: torch.device, dtype: torch.dtype, out: torch.dtype, tolerance: float
) -> None:
    """Errors relative to the largest number of each result. Gradients are of the inputs' dtype; in the norms', of both
    signs, much cancels: four times the tolerance."""
    values, tangents, norms = draw((1, 66, 2, 32), kernels, dtype)
    leaves = [x.requires_grad_() for x in (*values, *norms)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected, t_expected = torch.func.jvp(
        lambda *x: mathematics(*x, *exact[3:], 2), tuple(exact[:3]), tuple(x.double() for x in tangents)
    )
    y, dy = run(values, tangents, norms, 2, out)
    assert y.dtype == dy.dtype == out
    g = like(y)
    gradients = torch.autograd.grad(y, leaves, g)
    assert [x.dtype for x in gradients] == [x.dtype for x in leaves]
    wanted = torch.autograd.grad(expected, exact, g.double())
    grain = max(tolerance, torch.finfo(dtype).eps if dtype != torch.float32 else 0)
    for got, want, bound in (
        (y, expected, tolerance),
        (dy, t_expected, tolerance),
        *zip(gradients, wanted, (grain,) * 3 + (4 * tolerance,) * 2, strict=True),
    ):
        assert (got.double() - want).abs().max() <= bound * want.abs().max()


def test_a_query_keeps_its_precision_where_values_are_nearly_alike(kernels: torch.device) -> None:
    """Values of 100 and a little: the parts that cancel in the tangent and in the query's gradient are large."""
    values, tangents, norms = draw((1, 70, 1, 32), kernels, torch.bfloat16)
    values[2] = (100 + values[2]).detach()
    values[0].requires_grad_()
    exact = [x.detach().double() for x in values]
    exact[0].requires_grad_()
    expected, t_expected = torch.func.jvp(
        lambda *x: mathematics(*x, *(n.double() for n in norms), 1), tuple(exact), tuple(x.double() for x in tangents)
    )
    y, dy = run(values, tangents, norms, 1, torch.float32)
    assert (dy - t_expected).abs().max() <= 1e-3 * t_expected.abs().max()
    g = like(y)
    (gradient,), (wanted,) = torch.autograd.grad(y, values[0], g), torch.autograd.grad(expected, exact[0], g.double())
    assert (gradient - wanted).abs().max() <= 2**-7 * wanted.abs().max()


def test_strided_tokens_and_gradients(kernels: torch.device) -> None:
    values, tangents, norms = draw((2, 5, 2, 16), kernels)
    across, d_across = (torch.cat(x, -1).mT.contiguous().mT for x in (values, tangents))
    across.requires_grad_()
    y, dy = linear_attention((across, d_across), *norms, EPS, 2, torch.float64)
    torch.testing.assert_close((y, dy), run(values, tangents, norms, 2, torch.float64))
    (got,) = torch.autograd.grad(y.mean(), across)  # of an expanded gradient
    (want,) = torch.autograd.grad(mathematics(*across.chunk(3, -1), *norms, 2).mean(), across)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e4, 1e15])
def test_extreme_sizes_stay_those_of_the_reference(kernels: torch.device, scale: float) -> None:
    """Also with tokens of zeros, and with queries and keys that no channel lets through."""
    values, tangents, norms = draw((1, 8, 2, 16), kernels, torch.float32)
    q, k, v = (scale * x for x in values)
    q[:, 0], k[:, 1] = 0, 0
    q[:, 2] = -norms[0].sign()
    for normed in (True, False) if scale == 1e-12 else (True,):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        weights = norms if normed else [None, None]
        y, dy = run(leaves, tangents, weights, 2, torch.float32)
        with dispatch.using("off"):
            expected, t_expected = run(leaves, tangents, weights, 2, torch.float32)
        sane = expected.isfinite() & t_expected.isfinite()
        assert sane.any()
        torch.testing.assert_close(y[sane], expected[sane], rtol=1e-4, atol=1e-6 * scale)
        size = t_expected[sane].abs().max().item()
        torch.testing.assert_close(dy[sane], t_expected[sane], rtol=1e-3, atol=1e-4 * size)
        assert (y[:, 0] == 0).all() and (not normed or (y[:, 2] == 0).all())
        g = torch.ones_like(y)
        for got, want in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True):
            assert got[want.isfinite()].isfinite().all()


def test_keys_that_no_channel_lets_through(kernels: torch.device) -> None:
    values, tangents, norms = draw((1, 5, 1, 16), kernels, torch.float32)
    values[1] = -norms[1].sign().expand_as(values[1])
    leaves = [x.requires_grad_() for x in values]
    y, dy = run(leaves, tangents, norms, 1, torch.float32)
    assert (y == 0).all() and (dy == 0).all()
    assert all((x == 0).all() for x in torch.autograd.grad(y, leaves, torch.ones_like(y)))


def test_a_nan_is_not_lost(kernels: torch.device) -> None:
    for place in range(3):  # in q, k, v
        values, _, norms = draw((1, 4, 1, 16), kernels, torch.bfloat16)
        values[place][0, 2, 5] = float("nan")
        assert run(values, None, norms, 1, torch.bfloat16)[0].isnan().any()


def test_runs_are_equal_in_all_bits_and_so_are_plain_and_dual(kernels: torch.device) -> None:
    dtype = torch.bfloat16
    values, tangents, norms = draw((1, 66, 2, 16), kernels, dtype)
    leaves = [x.requires_grad_() for x in (*values, *norms)]
    results = []
    for _ in range(2):
        y, dy = run(values, tangents, norms, 2, dtype)
        results.append((y, dy, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    y, none = run(values, None, norms, 2, dtype)
    assert none is None
    plain = y, results[0][1], *torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(plain, results[0], strict=True))


def test_a_sample_does_not_depend_on_its_batch(kernels: torch.device) -> None:
    values, _, norms = draw((3, 70, 1, 16), kernels, torch.bfloat16)
    alone = run([x[1:2] for x in values], None, norms, 1, torch.bfloat16)[0]
    assert torch.equal(run(values, None, norms, 1, torch.bfloat16)[0][1:2], alone)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dual", [True, False])
def test_compiled_is_eager(kernels: torch.device, dual: bool) -> None:
    values, tangents, norms = draw((2, 6, 2, 16), kernels, torch.float32)
    leaves = [x.requires_grad_() for x in (*values, *norms)]

    def function(values: list[Tensor], tangents: list[Tensor], norms: list[Tensor]) -> Any:
        return run([2 * x for x in values], tangents if dual else None, norms, 2, torch.bfloat16)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        y, dy = call(values, tangents, norms)
        results.append([y, *([dy] if dual else []), *torch.autograd.grad(y.float().square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_forward_mode_differentiation_takes_the_reference(kernels: torch.device) -> None:
    values, tangents, norms = draw((1, 4, 2, 16), kernels)

    def differentiated(call: Callable[..., Tensor]) -> Any:
        return torch.func.jvp(call, tuple(values), tuple(tangents))

    got = differentiated(lambda *x: run(list(x), None, norms, 2, torch.float64)[0])
    torch.testing.assert_close(got, differentiated(lambda *x: mathematics(*x, *norms, 2)))


def test_the_reference_is_the_mathematics(kernels: torch.device) -> None:
    values, tangents, norms = draw((2, 5, 2, 8), kernels)
    expected = torch.func.jvp(lambda *x: mathematics(*x, *norms, 2), tuple(values), tuple(tangents))
    qkv = side_by_side(values, tangents)
    torch.testing.assert_close(reference(qkv, *norms, EPS, 2, torch.float64), expected)
    # Heads of 8 columns have no kernel.
    torch.testing.assert_close(linear_attention(qkv, *norms, EPS, 2, torch.float64), expected)


def test_what_it_costs() -> None:
    size = Size(1, 2, 2, 3, dim=32, heads=2, cross_heads=1, hidden=1)
    plain, dual = (OPERATOR.inputs(size, torch.bfloat16, torch.device("cpu"), tangents) for tangents in (False, True))
    tokens, norms = 2 * 6 * 32, 2 * 32 * 4
    assert OPERATOR.cost(*plain) == (2 * 2 * tokens * 17, 4 * tokens * 2 + norms)
    assert OPERATOR.cost(*dual) == (6 * 2 * tokens * 17, 8 * tokens * 2 + norms)
    assert OPERATOR.backward_cost is not None
    assert OPERATOR.backward_cost(*dual) == (5 * 2 * tokens * 17, 7 * tokens * 2 + 2 * norms)
