"""Attention with a tangent in PyTorch's operators against the formula in fp64, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from tbcm_kernels import attention as module
from tbcm_kernels.attention import attention
from torch import Tensor

SHAPES = [(2, 3, 5, 7, 4, 4), (1, 2, 9, 9, 8, 6), (2, 1, 1, 3, 2, 2)]
"""Batch, heads, queries, keys, width of queries and keys, width of values."""


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 4)


def case(shape: tuple[int, ...], bias: str) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    batch, heads, queries, keys, width, out = shape
    torch.manual_seed(0)
    sizes = (queries, width), (keys, width), (keys, out)
    values = [torch.randn(batch, heads, *size, dtype=torch.float64, requires_grad=True) for size in sizes]
    tangents = [torch.randn_like(x) for x in values]
    shapes = {"none": None, "keys": (batch, 1, 1, keys), "all": (queries, keys)}
    size = shapes[bias]
    return values, tangents, None if size is None else torch.randn(size, dtype=torch.float64)


def formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = torch.einsum("bhtd,bhld->bhtl", q, k) * scale + (0 if bias is None else bias)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("bhtl,bhle->bhte", weights, v)


@pytest.mark.parametrize("bias", ["none", "keys", "all"])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_tangent_and_gradients(shape: tuple[int, ...], bias: str) -> None:
    values, tangents, added = case(shape, bias)
    want, dwant = torch.func.jvp(lambda *x: formula(*x, added, 0.3), tuple(values), tuple(tangents))
    q, k, v = zip(values, tangents, strict=True)
    out, dout = attention(q, k, v, added, 0.3)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    assert dout is not None and not dout.requires_grad
    torch.testing.assert_close(dout, dwant.detach(), rtol=0, atol=1e-12)
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), values)
    for got, expected in zip(found, torch.autograd.grad((want * weight).sum(), values), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_a_tangent_that_is_not_given_is_zero() -> None:
    values, tangents, _ = case(SHAPES[0], "none")
    given = attention((values[0], tangents[0]), (values[1], None), (values[2], None), None, 0.5)
    zeros = [torch.zeros_like(x) for x in values[1:]]
    explicit = attention((values[0], tangents[0]), (values[1], zeros[0]), (values[2], zeros[1]), None, 0.5)
    torch.testing.assert_close(given[1], explicit[1], rtol=0, atol=0)
    q, k, v = ((x, None) for x in values)
    plain, none = attention(q, k, v, None, 0.5)
    assert none is None
    torch.testing.assert_close(plain, given[0], rtol=0, atol=1e-12)


def test_nothing_is_kept_for_backward_but_what_went_in() -> None:
    values, tangents, bias = case((2, 3, 64, 64, 4, 4), "keys")
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        attention(*zip(values, tangents, strict=True), bias, 0.5)
    assert bias is not None
    assert sum(x.numel() for x in kept) == sum(x.numel() for x in (*values, bias))


def test_the_graph_of_a_tangent_ends_here() -> None:
    """Backward is for the value: what made the tangents is not kept for it."""
    values, tangents, _ = case(SHAPES[0], "none")
    moved = [d * x for x, d in zip(values, tangents, strict=True)]
    out, _ = attention(*zip(values, moved, strict=True), None, 0.5)
    reached, todo = set[object](), [out.grad_fn]
    while todo:
        if (node := todo.pop()) is not None:
            reached.add(node)
            todo += [after for after, _ in node.next_functions]
    assert len(reached) == 1 + 3, "of attention itself and of the three leaves"
    assert not reached & {d.grad_fn for d in moved}


def test_half_precision_and_the_compiler() -> None:
    torch.library.opcheck(
        torch.ops.tbcm.attention.default,
        (*[torch.randn(1, 2, 6, 4) for _ in range(6)], None, 0.5),
        test_utils=("test_schema", "test_faketensor"),
    )
    values, tangents, bias = case((2, 3, 32, 48, 16, 16), "keys")
    exact = attention(*zip(values, tangents, strict=True), bias, 0.25)
    halves = [(x.detach().bfloat16(), d.bfloat16()) for x, d in zip(values, tangents, strict=True)]
    found = attention(*halves, bias, 0.25)
    for got, want in zip(found, exact, strict=True):
        assert got is not None and want is not None and got.dtype == torch.bfloat16
        assert float((got.double() - want).norm() / want.norm()) < 0.02
