"""The kernel of `attention`, value and tangent in one pass over the keys, as an operator with a gradient.

It rescales its sums as a greater score appears (Dao et al. 2022, FlashAttention), and re-centres the tangent's as the
mean moves, so that a tangent common to all keys costs no precision. No scores are written: memory is linear in length,
forward and backward. Saved for backward: query, key, value, bias, out, and for each query and head the greatest score
and one over the sum of weights relative to it (apart: a logarithm of both loses the sum where a large bias hides all
keys).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbcm_kernels.attention_backward import fused_attention_backward
from tbcm_kernels.attention_tiles import blocks, constants, exponents, in_tokens, sizes, strides
from tbcm_kernels.heads import inner, is_half, load_head, outer, store_head, with_rows, zero_head
from tbcm_kernels.launch import jit, launch, operator, tl, triton


@jit
def _attention_kernel(
    query, query_tangent, key, key_tangent, value, value_tangent, bias, out, out_tangent, stats,
    total, heads, queries, keys,
    q_sample, q_head, q_row, k_sample, k_head, k_row, v_sample, v_head, v_row, b_sample, b_head, b_row, b_key,
    DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, SCALE: tl.constexpr, NATURAL: tl.constexpr,
    PER_QUERY: tl.constexpr, RAGGED: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q queries of a head, over all keys. What the tangent adds leaves the value's arithmetic alone; keys and
    values may be without one."""
    parts = tl.cdiv(queries, BLOCK_Q)
    first = tl.program_id(0) % parts * BLOCK_Q
    index = (tl.program_id(0) // parts).to(tl.int64)
    sample, head = index // heads, index % heads
    count = queries - first
    rows = tl.arange(0, BLOCK_Q)
    place = sample * q_sample + head * q_head + first * tl.cast(q_row, tl.int64)
    q, q_rest = load_head(query + place, q_row, count, BLOCK_Q, DIM, MAIN, REST, DOT)
    acc, acc_rest = zero_head(BLOCK_Q, MAIN, REST, WIDE)
    dq, dq_rest, dacc, dacc_rest = q, q_rest, acc, acc_rest
    if out_tangent is not None:
        dq, dq_rest = load_head(query_tangent + place, q_row, count, BLOCK_Q, DIM, MAIN, REST, DOT)
    mean = tl.zeros([BLOCK_Q], WIDE)
    peak = tl.full([BLOCK_Q], float("-inf"), WIDE)
    sums = tl.zeros([BLOCK_Q], WIDE)
    hidden = bias
    if bias is not None:
        hidden = bias + sample * b_sample + head * b_head + first * tl.cast(b_row, tl.int64)
    for start in range(0, keys, BLOCK_K):
        left = keys - start
        k_place = sample * k_sample + head * k_head + start * tl.cast(k_row, tl.int64)
        v_place = sample * v_sample + head * v_head + start * tl.cast(v_row, tl.int64)
        k, k_rest = load_head(key + k_place, k_row, left, BLOCK_K, DIM, MAIN, REST, DOT)
        v, v_rest = load_head(value + v_place, v_row, left, BLOCK_K, DIM, MAIN, REST, DOT)
        columns = start + tl.arange(0, BLOCK_K)
        s = exponents(
            inner(q, q_rest, k, k_rest, REST, WIDE), hidden, rows[:, None], columns[None, :], count, keys, b_row, b_key,
            SCALE, PER_QUERY, RAGGED, WIDE,
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(s, 1))
        p = tl.exp2(s - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        peak = new_peak
        sums = sums * decay + tl.sum(p, 1)
        acc = acc * decay[:, None]
        acc_rest = acc_rest * decay[:, None]
        if out_tangent is not None:
            ds = inner(dq, dq_rest, k, k_rest, REST, WIDE)
            if key_tangent is not None:
                dk, dk_rest = load_head(key_tangent + k_place, k_row, left, BLOCK_K, DIM, MAIN, REST, DOT)
                ds += inner(q, q_rest, dk, dk_rest, REST, WIDE)
            dp = p * (ds * NATURAL - mean[:, None])
            step = tl.sum(dp, 1) / sums
            mean += step
            dp = dp - p * step[:, None]
            dacc = dacc * decay[:, None] - acc * step[:, None]
            dacc_rest = dacc_rest * decay[:, None] - acc_rest * step[:, None]
            dacc, dacc_rest = outer(dp.to(DOT), v, v_rest, dacc, dacc_rest, REST, WIDE)
            if value_tangent is not None:
                dv, dv_rest = load_head(value_tangent + v_place, v_row, left, BLOCK_K, DIM, MAIN, REST, DOT)
                dacc, dacc_rest = outer(p.to(DOT), dv, dv_rest, dacc, dacc_rest, REST, WIDE)
        acc, acc_rest = outer(p.to(DOT), v, v_rest, acc, acc_rest, REST, WIDE)
    share = 1.0 / sums
    stat = index * queries + first + rows
    tl.store(stats + stat, peak, mask=rows < count)
    tl.store(stats + total + stat, share, mask=rows < count)
    share = share[:, None]
    width = heads * DIM
    place = ((sample * queries + first) * heads + head) * DIM
    store_head(out + place, width, count, acc * share, acc_rest * share, BLOCK_Q, DIM, MAIN, REST)
    if out_tangent is not None:
        store_head(out_tangent + place, width, count, dacc * share, dacc_rest * share, BLOCK_Q, DIM, MAIN, REST)


def _blocks(dim: int, dtype: torch.dtype) -> dict[str, int]:
    """The same with and without a tangent, so that the value is equal in all bits: what keeps both in registers."""
    if not is_half(dtype):
        return blocks(16, 16, 4 if dim <= 64 else 8, 1)
    return blocks(128, 64 if dim <= 64 else 32, 8) if dim <= 128 else blocks(32, 32, 8)


@operator("tbcm::fused_attention")
def fused_attention(
    q: Tensor, dq: Tensor | None, k: Tensor, dk: Tensor | None, v: Tensor, dv: Tensor | None, bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The result; its tangent, without elements where `dq` is None; and of all queries [2, B, heads, T] the greatest
    score, as a power of two, and one over the sum of weights relative to it."""
    (q, dq), (k, dk), (v, dv) = _alike(q, dq), _alike(k, dk), _alike(v, dv)
    out, tangent = in_tokens(q), q.new_empty(0) if dq is None else in_tokens(q)
    stats = q.new_empty(2, *q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    tile = _blocks(q.shape[-1], q.dtype)
    launch(
        _attention_kernel,
        (q.shape[:2].numel() * triton.cdiv(q.shape[2], tile["BLOCK_Q"]),),
        q, dq, k, dk, v, dv, bias, out, None if dq is None else tangent, stats,
        *sizes(q, k), *strides(q, k, v, bias),
        **constants(q, k, bias, scale, tile),
    )  # fmt: skip
    return out, tangent, stats


def _alike(x: Tensor, dx: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both with the same strides and contiguous rows: they mostly are, and copied where they are not."""
    x = with_rows(x)
    if dx is None or dx.stride() == x.stride():
        return x, dx
    x = x.contiguous()
    return x, dx.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, _, k, _, v, _, bias, ctx.scale = inputs
    out, tangent, stats = output
    ctx.mark_non_differentiable(tangent, stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, bias, out, stats)


def _backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 8
    q, k, v, bias, out, stats = ctx.saved_tensors
    dq, dk, dv = fused_attention_backward(gradient, q, k, v, bias, out, stats, ctx.scale)
    return dq, None, dk, None, dv, None, None, None


fused_attention.register_autograd(_backward, setup_context=_save)
