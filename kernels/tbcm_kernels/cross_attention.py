"""Softmax attention of image tokens to their prompt's text, plain and dual.

The n samples of a prompt attend together, as one sequence of n T queries. Per head, with s = q k^T / sqrt(d) + bias:

    p = exp(s - max s),   out = sum p v / sum p

and, the text's tangent being zero, with ds = dq k^T / sqrt(d):

    dout = sum p (ds - mean) v / sum p,   mean = sum p ds / sum p

One kernel goes over blocks of the keys, rescales its sums as a greater score appears (Dao et al. 2022, FlashAttention),
and re-centres the tangent's as the mean moves, so that a tangent common to all keys costs no precision. No scores are
written: memory is linear in length. Saved for backward: query, key, value, bias, out, and for each query and head the
greatest score and the sum of exponentials (apart: a logarithm of both loses the sum where everything is masked by a
large bias).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tbcm_kernels import dispatch
from tbcm_kernels.catalog import Cost, Dual, Operator, Size, nbytes
from tbcm_kernels.cross_attention_backward import cross_attention_backward, head_constants, queries_per_prompt
from tbcm_kernels.heads import inner, is_half, load_head, outer, store_head, with_rows, zero_head
from tbcm_kernels.launch import jit, launch, operator, tl, triton

_LARGEST_HEAD = 128


def cross_attention(query: Dual, key: Tensor, value: Tensor, bias: Tensor, heads: int, *, explicit: bool) -> Dual:
    """Softmax attention of prompt-major samples to their prompt's text, whose tangent is zero.

    query [P n, T, D], key and value [P, L, D], bias [P, 1, L] added to the scores, without a gradient. The result has
    query's shape and value's dtype. `explicit` matters to the reference alone: it spells the softmax out, so that
    torch.func.jvp can differentiate it, also where there is no tangent.
    """
    if not dispatch.fused("cross_attention", *query, key, value, bias, unsupported=_unsupported(query[0], key, heads)):
        return reference(query, key, value, bias, heads, explicit=explicit)
    if query[1] is None:
        return _plain(query[0], key, value, bias, heads)[0], None
    out, tangent, _ = _dual(query[0], query[1].detach(), key, value, bias, heads)
    return out, tangent


def _unsupported(query: Tensor, key: Tensor, heads: int) -> str | None:
    dim = key.shape[-1] // heads
    if dim > _LARGEST_HEAD:
        return f"heads of {dim} columns, more than {_LARGEST_HEAD}"
    if query.dim() != 3 or key.shape[1] == 0:
        return f"queries {list(query.shape)} with keys {list(key.shape)}"
    return None


def reference(query: Dual, key: Tensor, value: Tensor, bias: Tensor, heads: int, *, explicit: bool) -> Dual:
    """`cross_attention` in plain PyTorch. Its fused attention, which has no tangent, where nothing asks for one."""
    together = key.shape[0], queries_per_prompt(query[0], key), key.shape[-1]
    q, k, v = (_heads(x, heads) for x in (query[0].reshape(together), key, value))
    if query[1] is None and not explicit:
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None].to(q.dtype))
        return _tokens(out).reshape(query[0].shape), None
    scale = q.shape[-1] ** -0.5
    weights = (q * scale @ k.mT + bias[:, None]).softmax(-1).to(v.dtype)
    out = _tokens(weights @ v).reshape(query[0].shape)
    if query[1] is None:
        return out, None
    with torch.no_grad():
        dscores = _heads(query[1].reshape(together), heads) * scale @ k.mT
        mean = (weights * dscores).sum(-1, keepdim=True)
        dout = (weights * (dscores - mean)).to(v.dtype) @ v
        return out, _tokens(dout).reshape(query[0].shape)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[P, T, D] -> [P, heads, T, D / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _tokens(x: Tensor) -> Tensor:
    """[P, heads, T, d] -> [P, T, heads d]."""
    return x.transpose(1, 2).flatten(-2)


@jit
def _cross_attention_kernel(
    query, tangent, key, value, bias, out, out_tangent, stats,
    total, queries, keys, key_batch, key_row, value_batch, value_row,
    DUAL: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    SCALE: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q queries of a head, over all keys of their prompt. What DUAL adds leaves the value's arithmetic alone."""
    head = tl.program_id(0) % HEADS
    first = tl.program_id(0) // HEADS * BLOCK_Q
    prompt = tl.program_id(1).to(tl.int64)
    width = HEADS * DIM
    count = queries - first
    row = prompt * queries + first
    place = row * width + head * DIM
    q, q_rest = load_head(query + place, width, count, BLOCK_Q, DIM, MAIN, REST, DOT)
    acc, acc_rest = zero_head(BLOCK_Q, MAIN, REST, WIDE)
    dq, dq_rest, dacc, dacc_rest = q, q_rest, acc, acc_rest
    if DUAL:
        dq, dq_rest = load_head(tangent + place, width, count, BLOCK_Q, DIM, MAIN, REST, DOT)
    mean = tl.zeros([BLOCK_Q], WIDE)
    peak = tl.full([BLOCK_Q], float("-inf"), WIDE)
    sums = tl.zeros([BLOCK_Q], WIDE)
    for start in range(0, keys, BLOCK_K):
        left = keys - start
        places = start + tl.arange(0, BLOCK_K)
        at = key + prompt * key_batch + start * key_row + head * DIM
        k, k_rest = load_head(at, key_row, left, BLOCK_K, DIM, MAIN, REST, DOT)
        at = value + prompt * value_batch + start * value_row + head * DIM
        v, v_rest = load_head(at, value_row, left, BLOCK_K, DIM, MAIN, REST, DOT)
        b = tl.load(bias + prompt * keys + places, mask=places < keys, other=float("-inf")).to(WIDE)
        s = inner(q, q_rest, k, k_rest, REST, WIDE) * SCALE + b[None, :]
        new_peak = tl.maximum(peak, tl.max(s, 1))
        # Keys that a bias of -inf excludes may come first: no difference of infinities.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp(s - base[:, None])
        decay = tl.exp(peak - base)
        peak = new_peak
        sums = sums * decay + tl.sum(p, 1)
        acc = acc * decay[:, None]
        acc_rest = acc_rest * decay[:, None]
        if DUAL:
            dp = p * (inner(dq, dq_rest, k, k_rest, REST, WIDE) * SCALE - mean[:, None])
            step = tl.sum(dp, 1) / tl.where(sums > 0, sums, 1.0)
            mean += step
            dp = (dp - p * step[:, None]).to(DOT)
            dacc = dacc * decay[:, None] - acc * step[:, None]
            dacc_rest = dacc_rest * decay[:, None] - acc_rest * step[:, None]
            dacc, dacc_rest = outer(dp, v, v_rest, dacc, dacc_rest, REST, WIDE)
        acc, acc_rest = outer(p.to(DOT), v, v_rest, acc, acc_rest, REST, WIDE)
    rows = tl.arange(0, BLOCK_Q)
    stat = head.to(tl.int64) * total + row + rows
    tl.store(stats + stat, peak, mask=rows < count)
    tl.store(stats + HEADS * total + stat, sums, mask=rows < count)
    share = 1.0 / sums[:, None]
    store_head(out + place, width, count, acc * share, acc_rest * share, BLOCK_Q, DIM, MAIN, REST)
    if DUAL:
        store_head(out_tangent + place, width, count, dacc * share, dacc_rest * share, BLOCK_Q, DIM, MAIN, REST)


def _blocks(dim: int, dtype: torch.dtype) -> dict[str, int]:
    """The same for the plain and the dual operator, whose values are equal in all bits: what keeps the dual in
    registers."""
    if not is_half(dtype):
        return {"BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}
    return {"BLOCK_Q": 64, "BLOCK_K": 32 if dim > 96 else 64, "num_warps": 4, "num_stages": 2}


def _run(
    query: Tensor, tangent: Tensor | None, key: Tensor, value: Tensor, bias: Tensor, heads: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The result, its tangent, and [2, heads, P n T]: greatest score and sum of exponentials."""
    prompts, keys, width = key.shape
    query, key, value = query.contiguous(), with_rows(key), with_rows(value)
    tangent = None if tangent is None else tangent.contiguous()
    bias = bias.expand(prompts, 1, keys).contiguous()
    queries, total = queries_per_prompt(query, key), query.shape[0] * query.shape[1]
    out = value.new_empty(query.shape)
    out_tangent = None if tangent is None else torch.empty_like(out)
    stats = query.new_empty(2, heads, total, dtype=_wide(value.dtype))
    blocks = _blocks(width // heads, value.dtype)
    launch(
        _cross_attention_kernel,
        (heads * triton.cdiv(queries, blocks["BLOCK_Q"]), prompts),
        query, tangent, key, value, bias, out, out_tangent, stats,
        total, queries, keys, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        DUAL=tangent is not None, **head_constants(key, value, heads), **blocks,
    )  # fmt: skip
    return out, out_tangent, stats


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@operator("tbcm::cross_attention")
def _plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    out, _, stats = _run(query, None, key, value, bias, heads)
    return out, stats


@operator("tbcm::cross_attention_dual")
def _dual(
    query: Tensor, tangent: Tensor, key: Tensor, value: Tensor, bias: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    out, out_tangent, stats = _run(query, tangent, key, value, bias, heads)
    assert out_tangent is not None
    return out, out_tangent, stats


def _save_plain(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bias, ctx.heads = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, bias, *output)


def _save_dual(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, _, key, value, bias, ctx.heads = inputs
    out, tangent, stats = output
    ctx.mark_non_differentiable(tangent, stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, bias, out, stats)


def _plain_backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return None, None, None, None, None
    query, key, value, bias, out, stats = ctx.saved_tensors
    return *cross_attention_backward(gradient, query, key, value, bias, out, stats, ctx.heads), None, None


def _dual_backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    query, *others = _plain_backward(ctx, gradient)
    return query, None, *others


_plain.register_autograd(_plain_backward, setup_context=_save_plain)
_dual.register_autograd(_dual_backward, setup_context=_save_dual)


def inputs(size: Size, dtype: torch.dtype, device: torch.device, tangents: bool) -> tuple[Any, ...]:
    """With a third of the text masked, as in `tbcm.models.sana.network`."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    query = normal(size.samples, size.tokens, size.dim)
    key, value = (normal(size.prompts, size.text, size.dim).requires_grad_() for _ in range(2))
    bias = torch.zeros(size.prompts, 1, size.text, device=device)
    bias[..., size.text * 2 // 3 :] = -10000.0
    tangent = torch.randn_like(query) if tangents else None
    return (query.requires_grad_(), tangent), key, value, bias, size.cross_heads


def cost(query: Dual, key: Tensor, value: Tensor, bias: Tensor, heads: int) -> Cost:
    """Two products of queries and keys or values, and as many for the tangent."""
    duals = 1 if query[1] is None else 2
    outs = duals * query[0].numel() * value.element_size()
    return Cost(2 * duals * _product(query[0], key), nbytes(*query, key, value, bias) + outs)


def backward_cost(query: Dual, key: Tensor, value: Tensor, bias: Tensor, heads: int) -> Cost:
    """Five products: scores, and the gradients of weights, query, key and value. The tangent has none."""
    outs = 2 * query[0].numel() * value.element_size()  # the result and its gradient
    return Cost(5 * _product(query[0], key), 2 * nbytes(query[0], key, value) + nbytes(bias) + outs)


def _product(query: Tensor, key: Tensor) -> int:
    """Operations of q k^T over all heads."""
    return 2 * query.numel() * key.shape[1]


OPERATOR = Operator(
    "cross_attention",
    run=partial(cross_attention, explicit=False),
    reference=partial(reference, explicit=False),
    inputs=inputs,
    cost=cost,
    backward_cost=backward_cost,
)
