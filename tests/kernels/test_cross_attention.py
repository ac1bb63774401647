"""Cross-attention kernels against the formula, spelled out sample by sample in fp64."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tbcm_kernels import cross_attention as op
from tbcm_kernels import cross_attention_backward as backward
from tbcm_kernels.catalog import Size
from tbcm_kernels.cross_attention import cross_attention
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

HALF = torch.bfloat16, torch.float16


def formula(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Every sample for itself, with its prompt's text repeated."""
    points, dim = len(query) // len(key), key.shape[-1] // heads
    q, k, v = (x.unflatten(-1, (heads, dim)) for x in (query, key, value))
    k, v, bias = (x.repeat_interleave(points, 0) for x in (k, v, bias))
    weights = (torch.einsum("bthd,blhd->bhtl", q, k) / dim**0.5 + bias[:, None]).softmax(-1)
    return torch.einsum("bhtl,blhd->bthd", weights, v).flatten(-2)


def problem(
    prompts: int, points: int, tokens: int, text: int, heads: int, dim: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """Query, its tangent, key, value and bias in fp64: the last third of the text is masked. And heads."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    width = heads * dim
    query, tangent = (normal(prompts * points, tokens, width) for _ in range(2))
    bias = torch.zeros(prompts, 1, text, dtype=torch.float64, device=device)
    bias[..., -(text // 3) or text :] = -10000.0
    return query, tangent, normal(prompts, text, width), normal(prompts, text, width), bias, heads


def gradients(out: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    weights = torch.arange(out.numel(), device=out.device).sin().reshape(out.shape)
    return torch.autograd.grad(out, leaves, weights.to(out.dtype))


def everything(query: Tensor, tangent: Tensor, key: Tensor, value: Tensor, bias: Tensor, heads: int) -> list[Tensor]:
    """Value, tangent, and gradients to query, key and value."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    out, dout = cross_attention((leaves[0], tangent), leaves[1], leaves[2], bias, heads, explicit=False)
    assert dout is not None and not dout.requires_grad
    return [out.detach(), dout, *gradients(out, *leaves)]


def expected(query: Tensor, tangent: Tensor, key: Tensor, value: Tensor, bias: Tensor, heads: int) -> list[Tensor]:
    """The same of the formula, in fp64."""
    query, tangent, key, value, bias = (x.double() for x in (query, tangent, key, value, bias))
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    out = formula(*leaves, bias, heads)
    _, dout = torch.func.jvp(lambda q: formula(q, key, value, bias, heads), (query,), (tangent,))
    return [out.detach(), dout, *gradients(out, *leaves)]


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    """Relative to each tensor's greatest element."""
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max().clip(1e-3)


def precision(device: torch.device) -> tuple[torch.dtype, float]:
    """Without a GPU the interpreter computes in fp64 too; a GPU in fp32 at best."""
    return (torch.float64, 1e-12) if device.type == "cpu" else (torch.float32, 1e-5)


def cast(arguments: tuple[Any, ...], dtype: torch.dtype) -> list[Any]:
    return [x.to(dtype) if isinstance(x, Tensor) else x for x in arguments]


SHAPES = {
    "one of all": (1, 1, 1, 1, 1, 16),
    "Sana 0.6B": (2, 3, 5, 40, 2, 72),
    "Sana 1.6B": (2, 1, 33, 33, 1, 112),
    "uneven": (1, 3, 23, 65, 1, 40),
    "narrow heads": (3, 1, 2, 5, 2, 6),
    "widest heads": (1, 2, 3, 4, 1, 128),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_value_tangent_and_gradients(kernels: torch.device, shape: tuple[int, ...]) -> None:
    dtype, tolerance = precision(kernels)
    arguments = cast(problem(*shape, kernels), dtype)
    assert_close(everything(*arguments), expected(*arguments), tolerance)


def test_gradcheck(kernels: torch.device) -> None:
    if kernels.type != "cpu":
        pytest.skip("fp64 runs in the interpreter alone")
    query, tangent, key, value, bias, heads = problem(1, 2, 2, 3, 1, 3, kernels)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    for dq in (None, tangent):
        assert torch.autograd.gradcheck(
            lambda q, k, v, dq=dq: cross_attention((q, dq), k, v, bias, heads, explicit=False)[0],
            leaves,
            fast_mode=True,
        )


def test_tangent_is_that_of_finite_differences(kernels: torch.device) -> None:
    if kernels.type != "cpu":
        pytest.skip("fp64 runs in the interpreter alone")
    query, tangent, *rest = problem(1, 2, 3, 70, 1, 24, kernels)
    step = 1e-5
    after, before = (
        cross_attention((query + sign * step * tangent, None), *rest, explicit=False)[0] for sign in (1, -1)
    )
    _, dout = cross_attention((query, tangent), *rest, explicit=False)
    torch.testing.assert_close(dout, (after - before) / (2 * step), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_dtypes(kernels: torch.device, dtype: torch.dtype, tolerance: float) -> None:
    arguments = cast(problem(1, 2, 5, 70, 1, 72, kernels), dtype)
    got = everything(*arguments)
    assert {x.dtype for x in got} == {dtype}
    assert_close(got, expected(*arguments), tolerance)


def test_mixed_dtypes_of_autocast(kernels: torch.device) -> None:
    """Behind a normalisation query, tangent and key are fp32, while value comes from a linear layer."""
    query, tangent, key, value, bias, heads = cast(problem(1, 2, 5, 20, 2, 40, kernels), torch.float32)
    arguments = query, tangent, key, value.bfloat16(), bias, heads
    got = everything(*arguments)
    assert [x.dtype for x in got] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    assert_close(got, expected(*arguments), 2e-2)
    with torch.autocast(kernels.type, torch.bfloat16):
        (reference, dreference) = op.reference((query, tangent), key, value.bfloat16(), bias, heads, explicit=True)
    assert_close(got[:2], [reference.double(), dreference.double()], 4e-2)
    assert reference.dtype == got[0].dtype and dreference.dtype == got[1].dtype


@pytest.mark.parametrize("prompts", [0, 2])
def test_no_samples(kernels: torch.device, prompts: int) -> None:
    query, tangent, key, value, bias, heads = cast(problem(prompts, 1, 3, 5, 2, 16, kernels), torch.float32)
    out, dout, dq, dk, dv = everything(query[:0], tangent[:0], key, value, bias, heads)
    assert out.shape == dout.shape == dq.shape == (0, 3, 32)
    assert dk.shape == dv.shape == key.shape and not dk.any() and not dv.any()
    reference, _ = op.reference((query[:0], None), key, value, bias, heads, explicit=True)
    assert reference.shape == out.shape


@pytest.mark.parametrize("masked", [-10000.0, float(torch.finfo(torch.float32).min)])
def test_where_everything_is_masked(kernels: torch.device, masked: float) -> None:
    """A finite bias common to all keys, padding of the last block excluded, leaves uniform weights of equal scores."""
    arguments = cast(problem(2, 1, 3, 70, 1, 16, kernels), torch.float32)
    arguments[0].zero_()
    arguments[4][0] = masked
    got = everything(*arguments)
    assert_close(got, expected(*arguments), 2e-6)
    torch.testing.assert_close(got[0][0], arguments[3][0].mean(0).expand(3, -1), rtol=1e-5, atol=1e-6)


def test_keys_excluded_by_infinity(kernels: torch.device) -> None:
    """A whole first block of them: its greatest score is minus infinity."""
    arguments = cast(problem(1, 1, 3, 140, 1, 16, kernels), torch.float32)
    arguments[4][..., :130] = -torch.inf
    arguments[4][..., 130:] = 0
    assert_close(everything(*arguments), expected(*arguments), 2e-6)


def test_extreme_scores(kernels: torch.device) -> None:
    """Weights of one and zero: scores of 1e6 and more, growing from block to block."""
    query, tangent, key, value, bias, heads = cast(problem(1, 2, 3, 100, 1, 16, kernels), torch.float32)
    key = key * 1e6 * torch.linspace(0.1, 1, 100, device=kernels)[:, None]
    got, want = (f(query, tangent, key, value, bias, heads) for f in (everything, expected))
    assert all(x.isfinite().all() for x in got)
    assert_close(got[:1], want[:1], 1e-6)


def test_tangent_common_to_all_keys_costs_no_precision(kernels: torch.device) -> None:
    """Where rounding to bf16 before the mean is subtracted would leave an error of several times the tangent."""
    query, tangent, key, value, bias, heads = cast(problem(1, 2, 5, 100, 1, 64, kernels), torch.float32)
    key[..., 0], query[..., 0], tangent[..., 0] = 1.0, 0.0, 4096.0
    arguments = [*cast((query, tangent, key, value), torch.bfloat16), bias, heads]
    got, want = everything(*arguments)[1], expected(*arguments)[1]
    assert_close([got], [want], 2e-2)


def test_bits_repeat_and_do_not_depend_on_the_tangent(kernels: torch.device) -> None:
    query, tangent, key, value, bias, heads = cast(problem(1, 2, 5, 70, 1, 72, kernels), torch.bfloat16)
    first, second = (everything(query, tangent, key, value, bias, heads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    plain, none = cross_attention((query, None), key, value, bias, heads, explicit=False)
    assert none is None and torch.equal(plain, first[0])


def test_partial_sums_over_queries(kernels: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt's queries split between programs, unevenly."""
    dtype, tolerance = precision(kernels)
    arguments = cast(problem(1, 2, 40, 7, 1, 16, kernels), dtype)
    whole = everything(*arguments)
    monkeypatch.setattr(backward, "_FEWEST_QUERIES", 30)
    split, again = (everything(*arguments) for _ in range(2))
    assert_close(split, [x.double() for x in whole], tolerance)
    assert all(torch.equal(a, b) for a, b in zip(split, again, strict=True))


def test_views(kernels: torch.device) -> None:
    """A layer's keys of [P, layers, L, D], values whose rows are not contiguous, a bias that is expanded."""
    query, tangent, key, value, bias, heads = cast(problem(2, 2, 3, 5, 2, 16, kernels), torch.float32)
    want = everything(query, tangent, key, value, bias[:1].expand_as(bias), heads)
    views = torch.stack([value, key, value], 1)[:, 1], value.mT.contiguous().mT
    query = query.transpose(0, 1).contiguous().transpose(0, 1)
    got = everything(query, tangent, *views, bias[:1].expand_as(bias), heads)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_compiled(kernels: torch.device, fresh_compiler: None) -> None:
    arguments = cast(problem(1, 2, 3, 20, 2, 24, kernels), torch.float32)
    run = torch.compile(cross_attention, fullgraph=True, backend="aot_eager")
    query, tangent, key, value, bias, heads = arguments
    want = everything(*arguments)
    for dq in (None, tangent):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out, dout = run((leaves[0], dq), leaves[1], leaves[2], bias, heads, explicit=False)
        got = [out, *([] if dout is None else [dout]), *gradients(out, *leaves)]
        same = want if dq is not None else [want[0], *want[2:]]
        assert all(torch.equal(a, b) for a, b in zip(got, same, strict=True))


def test_fake_results_are_as_the_real(kernels: torch.device) -> None:
    query, tangent, key, value, bias, heads = cast(problem(2, 2, 3, 5, 2, 16, kernels), torch.float32)
    out, stats = op._plain(query, key, value.bfloat16(), bias, heads)
    torch.library.opcheck(op._plain, (query, key, value.bfloat16(), bias, heads), test_utils="test_faketensor")
    torch.library.opcheck(op._dual, (query, tangent, key, value.bfloat16(), bias, heads), test_utils="test_faketensor")
    torch.library.opcheck(
        backward.cross_attention_backward,
        (out, query, key, value.bfloat16(), bias, out, stats, heads),
        test_utils="test_faketensor",
    )


def test_forward_mode_of_pytorch_is_right(kernels: torch.device) -> None:
    query, tangent, *rest = cast(problem(1, 2, 3, 5, 2, 16, kernels), torch.float32)
    _, dout = torch.func.jvp(lambda q: cross_attention((q, None), *rest, explicit=True)[0], (query,), (tangent,))
    assert_close([dout], expected(query, tangent, *rest)[1:2], 2e-6)


def test_heads_that_are_too_wide_take_the_reference(kernels: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    arguments = cast(problem(1, 1, 2, 3, 1, 130, kernels), torch.float32)
    with caplog.at_level(logging.WARNING, "tbcm_kernels.dispatch"):
        assert_close(everything(*arguments), expected(*arguments), 2e-6)
    assert "130 columns" in caplog.text


@pytest.mark.parametrize("tangents", [False, True])
def test_cost(tangents: bool) -> None:
    """Operations as PyTorch counts them; bytes of what goes in and comes out."""
    size = Size(2, 3, 4, 5, dim=48, heads=2, cross_heads=3, hidden=1, text=7)
    arguments = op.inputs(size, torch.bfloat16, torch.device("cpu"), tangents)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out, dout = op.reference(*arguments, explicit=True)
    cost = op.cost(*arguments)
    assert cost.flops == counter.get_total_flops()
    (query, dq), key, value, bias, _ = arguments
    assert cost.bytes == sum(x.nbytes for x in (query, dq, key, value, bias, out, dout) if x is not None)
    assert op.backward_cost(*arguments).flops == 5 * 2 * (2 * 3 * 4 * 5) * 7 * 48
