"""Attention's kernels against the formula in fp64."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from tbcm_kernels import attention as op
from tbcm_kernels import attention_forward as forward
from tbcm_kernels import attention_tiles as tiles
from tbcm_kernels.attention import attention
from tbcm_kernels.attention_backward import fused_attention_backward
from tbcm_kernels.attention_forward import fused_attention
from tbcm_kernels.catalog import Size
from tbcm_kernels.launch import compile_ahead, launch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional

from tbcm.models.differentiation.explicit import Differentiable
from tbcm.training.accounting import CostCounter

SCALE = 0.3
Problem = tuple[list[Tensor], list[Tensor], Tensor | None]
"""Queries, keys and values; their tangents; a bias."""


def formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    scores = torch.einsum("...td,...ld->...tl", q, k) * SCALE + (0 if bias is None else bias)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("...tl,...le->...te", weights, v) / weights.sum(-1, keepdim=True)


def problem(
    device: torch.device, batch: int, heads: int, queries: int, keys: int, dim: int, bias: str = "none"
) -> Problem:
    """In fp64, of both signs and sizes around one; memory as networks have it, tokens before heads."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    made = [normal(batch, n, heads, dim).transpose(1, 2) for n in (queries, keys, keys) * 2]
    shapes = {"keys": (batch, 1, 1, keys), "each query": (queries, keys), "each head": (1, heads, queries, keys)}
    added = normal(*shapes[bias]) if bias in shapes else None
    if bias == "mask":
        added = torch.zeros(batch, 1, 1, keys, dtype=torch.float64, device=device)
        added[..., keys // 2 :] = torch.finfo(torch.float32).min
    return made[:3], made[3:], added


def in_dtype(given: Problem, dtype: torch.dtype) -> Problem:
    values, tangents, bias = given
    return [x.to(dtype) for x in values], [x.to(dtype) for x in tangents], bias


def gradients(out: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.arange(out.numel(), device=out.device).sin().reshape(out.shape)
    return torch.autograd.grad(out, leaves, weights.to(out.dtype))


def everything(given: Problem, *, plain: bool = False, fused: bool = True) -> list[Tensor]:
    """Value, tangent (unless plain) and gradients."""
    values, tangents, bias = given
    leaves = [x.detach().requires_grad_() for x in values]
    q, k, v = zip(leaves, [None] * 3 if plain else tangents, strict=True)
    out, dout = attention(q, k, v, bias, SCALE)
    assert (dout is None) if plain else (dout is not None and not dout.requires_grad)
    assert ("fused_attention" in str(out.grad_fn)) is fused
    return [out.detach(), *([] if dout is None else [dout]), *gradients(out, leaves)]


def expected(given: Problem) -> list[Tensor]:
    """Of the formula, in fp64."""
    values, tangents, bias = given
    leaves = [x.detach().double().requires_grad_() for x in values]
    added = None if bias is None else bias.double()
    moved = tuple(x.double() for x in tangents)
    out, dout = torch.func.jvp(lambda *x: formula(*x, added), tuple(leaves), moved)
    return [out.detach(), dout.detach(), *gradients(out, leaves)]


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    """Relative to each tensor's greatest element."""
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max().clip(1e-3)


def exactly(device: torch.device) -> tuple[torch.dtype, float]:
    """The interpreter computes in fp64 too; a GPU in fp32 at best."""
    return (torch.float64, 1e-12) if device.type == "cpu" else (torch.float32, 1e-5)


CASES = {
    "one of all": (1, 1, 1, 1, 8, "none"),
    "heads of 8": (2, 2, 5, 7, 8, "each query"),
    "heads of 40": (1, 2, 18, 18, 40, "keys"),
    "heads of 64": (1, 1, 33, 17, 64, "each head"),
    "heads of 72, masked": (2, 1, 17, 21, 72, "mask"),
    "text": (2, 2, 19, 5, 16, "none"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_value_tangent_and_gradients(kernels: torch.device, case: tuple[int, int, int, int, int, str]) -> None:
    dtype, tolerance = exactly(kernels)
    given = in_dtype(problem(kernels, *case), dtype)
    assert_close(everything(given), expected(given), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_dtypes(kernels: torch.device, dtype: torch.dtype, tolerance: float) -> None:
    """Several of the blocks of each. What rounding of inputs costs is the formula's too."""
    given = in_dtype(problem(kernels, 1, 1, 130, 70, 64, "keys"), dtype)
    got = everything(given)
    assert {x.dtype for x in got} == {dtype}
    assert_close(got, expected(given), tolerance)


@pytest.mark.parametrize("dim", [128, 160])
def test_wide_heads(kernels: torch.device, dim: int) -> None:
    given = in_dtype(problem(kernels, 1, 1, 40, 34, dim), torch.bfloat16)
    assert_close(everything(given), expected(given), 2e-2)


@pytest.mark.parametrize("given", ["query", "key", "value", "key and value"])
def test_a_tangent_that_is_not_given_is_zero(kernels: torch.device, given: str) -> None:
    dtype, tolerance = exactly(kernels)
    values, tangents, _ = in_dtype(problem(kernels, 1, 2, 5, 7, 8), dtype)
    has = [name in given for name in ("query", "key", "value")]
    q, k, v = ((x, d if h else None) for x, d, h in zip(values, tangents, has, strict=True))
    found = attention(q, k, v, None, SCALE)
    zeroed = [d * h for d, h in zip(tangents, has, strict=True)]
    assert found[1] is not None
    assert_close([found[0], found[1]], expected((values, zeroed, None))[:2], tolerance)


def test_bits_repeat_and_do_not_depend_on_the_tangent(kernels: torch.device) -> None:
    given = in_dtype(problem(kernels, 1, 1, 140, 70, 40, "mask"), torch.bfloat16)
    first, second, plain = everything(given), everything(given), everything(given, plain=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip([first[0], *first[2:]], plain, strict=True))


def test_queries_that_see_nothing_see_all_alike(kernels: torch.device) -> None:
    """As the reference does: a bias that hides all keys is one common to all. Infinite ones hide the same."""
    for hidden in (torch.finfo(torch.float32).min, -torch.inf):
        given = in_dtype(problem(kernels, 2, 1, 3, 20, 16, "mask"), torch.float32)
        assert given[2] is not None
        given[2][0], given[2][1, ..., 10:] = torch.finfo(torch.float32).min, hidden
        got = everything(given)
        torch.testing.assert_close(got[0][0], given[0][2][0].mean(1, keepdim=True).expand(-1, 3, -1))
        assert_close([x[1] for x in got], [x[1] for x in expected(given)], 2e-6)
        assert all(x.isfinite().all() for x in got)


def test_extreme_scores(kernels: torch.device) -> None:
    """Weights of one and zero: scores of 1e6 and more, growing from block to block."""
    values, tangents, _ = in_dtype(problem(kernels, 1, 1, 3, 40, 16), torch.float32)
    values[1] = values[1] * 1e6 * torch.linspace(0.1, 1, 40, device=kernels)[:, None]
    got = everything((values, tangents, None))
    assert all(x.isfinite().all() for x in got)
    assert_close(got[:1], expected((values, tangents, None))[:1], 1e-6)


def test_a_tangent_common_to_all_keys_costs_no_precision(kernels: torch.device) -> None:
    """Where rounding to bf16 before the mean is subtracted would leave an error of several times the tangent."""
    values, tangents, _ = problem(kernels, 1, 1, 5, 140, 64)
    values[1][..., 0], values[0][..., 0], tangents[0][..., 0] = 1.0, 0.0, 4096.0
    given = in_dtype((values, tangents, None), torch.bfloat16)
    assert_close(everything(given)[1:2], expected(given)[1:2], 2e-2)


def test_any_layout(kernels: torch.device) -> None:
    """Heads before tokens, slices of one projection, an expanded bias, a tangent unlike its value: the same bits."""
    values, tangents, bias = in_dtype(problem(kernels, 2, 2, 9, 9, 16, "each query"), torch.float32)
    assert bias is not None
    want = everything((values, tangents, bias))
    fused = torch.cat([x.transpose(1, 2).flatten(2) for x in values], -1).unflatten(-1, (3, 2, 16))
    slices = [x.transpose(1, 2) for x in fused.unbind(2)]
    for views, moved in (
        ([x.contiguous() for x in values], tangents),
        (slices, [x.contiguous() for x in tangents]),
        ([x.mT.contiguous().mT for x in values], tangents),
    ):
        turned = bias.mT.contiguous().mT.expand(2, 2, 9, 9)
        assert all(torch.equal(a, b) for a, b in zip(everything((views, moved, turned)), want, strict=True))


def test_no_queries(kernels: torch.device) -> None:
    got = everything(in_dtype(problem(kernels, 1, 2, 0, 5, 8), torch.float32))
    assert got[0].shape == got[1].shape == got[2].shape == (1, 2, 0, 8)
    assert not got[3].any() and not got[4].any()


def test_within_a_network_that_is_differentiated(
    kernels: torch.device, fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's own attention under torch.func.jvp, eager and compiled, with queries that a mask leaves no keys."""
    launched: list[object] = []

    def recorded(kernel: object, grid: tuple[int, ...], *given: Tensor, **named: object) -> None:
        if not isinstance(given[0], FakeTensor):  # a compiler asks what would come out
            launched.append(kernel)
        launch(kernel, grid, *given, **named)

    monkeypatch.setattr(forward, "launch", recorded)
    dtype, tolerance = exactly(kernels)
    values, tangents, _ = in_dtype(problem(kernels, 1, 2, 5, 7, 8), dtype)
    mask = torch.ones(5, 7, dtype=torch.bool, device=kernels).tril(1)
    mask[3] = False

    def network(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k.sin(), v, attn_mask=mask, scale=SCALE)

    def one_pass(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        with Differentiable():
            out, dout = torch.func.jvp(network, leaves, tuple(tangents))
        return out, dout.detach()

    step = 1e-6
    for run in (one_pass, torch.compile(one_pass, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().requires_grad_() for x in values]
        out, dout = run(*leaves)
        assert len(launched) == 1
        launched.clear()
        want = network(*(twins := [x.detach().requires_grad_() for x in values]))
        assert_close([out, *gradients(out, leaves)], [want, *gradients(want, twins)], tolerance)
        if dtype == torch.float64:
            ahead, behind = (
                network(*(x + s * d for x, d in zip(values, tangents, strict=True))) for s in (step, -step)
            )
            torch.testing.assert_close(dout, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)


def test_under_autocast_all_are_cast_as_for_torchs_own(kernels: torch.device) -> None:
    """Behind a normalisation queries and keys are fp32, while values come from a linear layer."""
    values, tangents, _ = in_dtype(problem(kernels, 1, 1, 5, 7, 16), torch.float32)
    values[2], tangents[2] = values[2].bfloat16(), tangents[2].bfloat16()
    leaves = [x.detach().requires_grad_() for x in values]
    with torch.autocast(kernels.type, torch.bfloat16):
        q, k, v = zip(leaves, tangents, strict=True)
        out, dout = attention(q, k, v, None, SCALE)
        assert out.dtype == functional.scaled_dot_product_attention(*values).dtype == torch.bfloat16
    assert dout is not None and dout.dtype == torch.bfloat16
    found = gradients(out, leaves)
    assert [x.dtype for x in found] == [torch.float32, torch.float32, torch.bfloat16]
    halves = in_dtype((values, tangents, None), torch.bfloat16)
    assert_close([out, dout, *found], expected(halves), 2e-2)


def test_memory_is_linear_in_tokens(kernels: torch.device) -> None:
    """What is kept, and the most that is held: accounted without data, the allocations that the kernels' hosts make."""

    def kept_and_peak(tokens: int) -> tuple[int, int]:
        with FakeTensorMode(), compile_ahead(), CostCounter() as counter:
            q, dq, k, dk, v, dv = (
                torch.empty(2, tokens, 4, 64, dtype=torch.bfloat16).transpose(1, 2) for _ in "qdkdvd"
            )
            bias, before = torch.empty(2, 1, 1, tokens), counter.live
            out, _tangent, stats = fused_attention._init_fn(q, dq, k, dk, v, dv, bias, SCALE)
            kept = counter.live - before
            fused_attention_backward._init_fn(torch.empty_like(out), q, k, v, bias, out, stats, SCALE)
        return kept, counter.peak - before

    rows, (kept, peak) = 2 * 4 * 1024, kept_and_peak(1024)
    assert kept == rows * (2 * 64 * 2 + 2 * 4)  # the result, its tangent, and two fp32 numbers of each query
    assert peak == kept + rows * (4 * 64 * 2 + 4)  # four gradients, and another such number
    assert kept_and_peak(4096) == (4 * kept, 4 * peak)


def test_nothing_else_is_kept_for_backward(kernels: torch.device) -> None:
    values, tangents, bias = in_dtype(problem(kernels, 1, 2, 5, 7, 8, "keys"), torch.float32)
    leaves, kept = [x.detach().requires_grad_() for x in values], list[Tensor]()
    q, k, v = zip(leaves, tangents, strict=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        attention(q, k, v, bias, SCALE)
    assert sorted(x.numel() for x in kept) == sorted([2 * 5 * 8, 2 * 7 * 8, 2 * 7 * 8, 7, 2 * 5 * 8, 2 * 2 * 5])


def test_fake_results_are_as_the_real(kernels: torch.device) -> None:
    values, tangents, bias = in_dtype(problem(kernels, 2, 2, 3, 5, 8, "keys"), torch.float32)
    (q, k, v), (dq, dk, dv) = values, tangents
    for given in ((q, dq, k, dk, v, dv, bias, SCALE), (q, dq, k, None, v, None, None, SCALE)):
        torch.library.opcheck(fused_attention, given, test_utils="test_faketensor")
    out, _, stats = fused_attention(q, None, k, None, v, None, bias, SCALE)
    torch.library.opcheck(
        fused_attention_backward, (out, q, k, v, bias, out, stats, SCALE), test_utils="test_faketensor"
    )


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ([(1, 2, 5, 136), (1, 2, 7, 136), (1, 2, 7, 136)], "heads of 136 columns of torch.float32, more than 128"),
        ([(1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 6)], "values [1, 2, 7, 6]"),
        ([(2, 5, 8), (2, 7, 8), (2, 7, 8)], "queries [2, 5, 8]"),
    ],
)
def test_what_kernels_cannot_do_takes_pytorchs_operators(
    kernels: torch.device, shapes: list[tuple[int, ...]], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    values, tangents = ([torch.randn(shape, device=kernels) for shape in shapes] for _ in range(2))
    with caplog.at_level(logging.WARNING, "tbcm_kernels.dispatch"):
        got = everything((values, tangents, None), fused=False)
    assert says in caplog.text
    assert_close(got, expected((values, tangents, None)), 2e-6)


@pytest.mark.parametrize(
    ("capability", "room", "refused", "stages"),
    [((7, 5), 65536, True, 1), ((8, 0), 166912, False, 2), ((8, 9), 101376, False, 1), ((9, 0), 232448, False, 2)],
)
def test_gpus_of_little_memory(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], room: int, refused: bool, stages: int
) -> None:
    """Those with less than an A100 load one block of wide heads at a time; those before it have no kernel."""
    properties = SimpleNamespace(shared_memory_per_block_optin=room)
    monkeypatch.setattr(tiles, "_is_there", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for dim, wanted in ((64, 2), (128, stages)):
        q = torch.empty(1, 1, 5, dim, dtype=torch.bfloat16)
        assert (tiles.unsupported(q, q, q) == "a GPU before Ampere") is refused
        assert tiles.constants(q, q, None, SCALE, tiles.blocks(64, 64, 8))["num_stages"] == wanted


@pytest.mark.parametrize("tangents", [False, True])
def test_cost(tangents: bool) -> None:
    """Operations as the step's accounting counts them; bytes of what goes in and comes out."""
    size = Size(2, 3, 4, 5, dim=48, heads=3, cross_heads=3, hidden=1)
    q, k, v, bias, scale = op.inputs(size, torch.bfloat16, torch.device("cpu"), tangents)
    assert q[0].shape == (6, 3, 20, 16)
    with CostCounter() as counter:
        out, dout = op.reference(q, k, v, bias, scale)
        forward = counter.flops
        out.sum().backward()
    cost, backward = op.cost(q, k, v, bias, scale), op.backward_cost(q, k, v, bias, scale)
    assert cost.flops == forward == (6 if tangents else 2) * 2 * (6 * 3 * 20 * 20) * 16
    assert backward.flops == counter.flops - forward == 5 * 2 * (6 * 3 * 20 * 20) * 16
    assert cost.bytes == sum(x.nbytes for x in (*q, *k, *v, out, dout) if x is not None)
    assert backward.bytes == 8 * out.nbytes  # q, k, v and their gradients, the result and its
    if tangents:  # keys and values of a text that does not move
        assert op.cost(q, (k[0], None), (v[0], None), bias, scale).flops == forward * 4 // 6
