"""Gradients of `attention`'s value.

With weights p = 2^(s - m) / l, recomputed from the scores s and each query's greatest score m and 1 / l, and with a
gradient g of the output:

    dv = p^T g,   ds = p (g v^T - sum(g out)),   dq = scale ds k,   dk = scale ds^T q

One kernel goes over the queries (dq, and sum(g out) of each), a second over the keys (dk, dv), so that every sum has
one order and nothing is added by atomics: seven products where five are needed (Dao 2023, FlashAttention-2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels.attention_tiles import as_tokens, blocks, constants, exponents, in_tokens, sizes, strides
from tbcm_kernels.heads import inner, is_half, load_head, outer, store_head, with_rows, zero_head
from tbcm_kernels.launch import jit, launch, operator, tl, triton


@jit
def _attention_query_gradient_kernel(
    query, key, value, bias, out, gradient, stats, delta, query_gradient,
    total, heads, queries, keys,
    q_sample, q_head, q_row, k_sample, k_head, k_row, v_sample, v_head, v_row, b_sample, b_head, b_row, b_key,
    DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, SCALE: tl.constexpr, NATURAL: tl.constexpr,
    PER_QUERY: tl.constexpr, RAGGED: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dq and delta of BLOCK_Q queries of a head. What is summed over a query's keys is divided by l at the end."""
    parts = tl.cdiv(queries, BLOCK_Q)
    first = tl.program_id(0) % parts * BLOCK_Q
    index = (tl.program_id(0) // parts).to(tl.int64)
    sample, head = index // heads, index % heads
    count = queries - first
    rows = tl.arange(0, BLOCK_Q)
    width = heads * DIM
    place = ((sample * queries + first) * heads + head) * DIM
    g, g_rest = load_head(gradient + place, width, count, BLOCK_Q, DIM, MAIN, REST, WIDE)
    o, o_rest = load_head(out + place, width, count, BLOCK_Q, DIM, MAIN, REST, WIDE)
    d = tl.sum(g * o, 1)
    if REST > 0:
        d += tl.sum(g_rest * o_rest, 1)
    g, g_rest = g.to(DOT), g_rest.to(DOT)
    at = query + sample * q_sample + head * q_head + first * tl.cast(q_row, tl.int64)
    q, q_rest = load_head(at, q_row, count, BLOCK_Q, DIM, MAIN, REST, DOT)
    dq, dq_rest = zero_head(BLOCK_Q, MAIN, REST, WIDE)
    stat = index * queries + first + rows
    tl.store(delta + stat, d, mask=rows < count)
    peak = tl.load(stats + stat, mask=rows < count, other=0.0)
    share = tl.load(stats + total + stat, mask=rows < count, other=0.0)
    hidden = bias
    if bias is not None:
        hidden = bias + sample * b_sample + head * b_head + first * tl.cast(b_row, tl.int64)
    for start in range(0, keys, BLOCK_K):
        left = keys - start
        at = key + sample * k_sample + head * k_head + start * tl.cast(k_row, tl.int64)
        k, k_rest = load_head(at, k_row, left, BLOCK_K, DIM, MAIN, REST, DOT)
        at = value + sample * v_sample + head * v_head + start * tl.cast(v_row, tl.int64)
        v, v_rest = load_head(at, v_row, left, BLOCK_K, DIM, MAIN, REST, DOT)
        columns = start + tl.arange(0, BLOCK_K)
        s = exponents(
            inner(q, q_rest, k, k_rest, REST, WIDE), hidden, rows[:, None], columns[None, :], count, keys, b_row, b_key,
            SCALE, PER_QUERY, RAGGED, WIDE,
        )  # fmt: skip
        ds = tl.exp2(s - peak[:, None]) * (inner(g, g_rest, v, v_rest, REST, WIDE) - d[:, None])
        dq, dq_rest = outer(ds.to(DOT), k, k_rest, dq, dq_rest, REST, WIDE)
    share = NATURAL * share[:, None]
    store_head(query_gradient + place, width, count, dq * share, dq_rest * share, BLOCK_Q, DIM, MAIN, REST)


@jit
def _attention_key_gradient_kernel(
    query, key, value, bias, gradient, stats, delta, key_gradient, value_gradient,
    total, heads, queries, keys,
    q_sample, q_head, q_row, k_sample, k_head, k_row, v_sample, v_head, v_row, b_sample, b_head, b_row, b_key,
    DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, SCALE: tl.constexpr, NATURAL: tl.constexpr,
    PER_QUERY: tl.constexpr, RAGGED: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_K keys of a head, over all queries. Scores are transposed."""
    parts = tl.cdiv(keys, BLOCK_K)
    first = tl.program_id(0) % parts * BLOCK_K
    index = (tl.program_id(0) // parts).to(tl.int64)
    sample, head = index // heads, index % heads
    left = keys - first
    width = heads * DIM
    at = key + sample * k_sample + head * k_head + first * tl.cast(k_row, tl.int64)
    k, k_rest = load_head(at, k_row, left, BLOCK_K, DIM, MAIN, REST, DOT)
    at = value + sample * v_sample + head * v_head + first * tl.cast(v_row, tl.int64)
    v, v_rest = load_head(at, v_row, left, BLOCK_K, DIM, MAIN, REST, DOT)
    dk, dk_rest = zero_head(BLOCK_K, MAIN, REST, WIDE)
    dv, dv_rest = zero_head(BLOCK_K, MAIN, REST, WIDE)
    columns = first + tl.arange(0, BLOCK_K)
    rows = tl.arange(0, BLOCK_Q)
    for start in range(0, queries, BLOCK_Q):
        count = queries - start
        at = query + sample * q_sample + head * q_head + start * tl.cast(q_row, tl.int64)
        q, q_rest = load_head(at, q_row, count, BLOCK_Q, DIM, MAIN, REST, DOT)
        at = gradient + ((sample * queries + start) * heads + head) * DIM
        g, g_rest = load_head(at, width, count, BLOCK_Q, DIM, MAIN, REST, DOT)
        stat = index * queries + start + rows
        # Beyond the last query a greatest score of infinity makes weights of zero.
        peak = tl.load(stats + stat, mask=rows < count, other=float("inf"))
        share = tl.load(stats + total + stat, mask=rows < count, other=0.0)
        d = tl.load(delta + stat, mask=rows < count, other=0.0)
        hidden = bias
        if bias is not None:
            hidden = bias + sample * b_sample + head * b_head + start * tl.cast(b_row, tl.int64)
        s = exponents(
            inner(k, k_rest, q, q_rest, REST, WIDE), hidden, rows[None, :], columns[:, None], count, keys, b_row, b_key,
            SCALE, PER_QUERY, RAGGED, WIDE,
        )  # fmt: skip
        p = tl.exp2(s - peak[None, :]) * share[None, :]
        ds = p * (inner(v, v_rest, g, g_rest, REST, WIDE) - d[None, :])
        dv, dv_rest = outer(p.to(DOT), g, g_rest, dv, dv_rest, REST, WIDE)
        dk, dk_rest = outer(ds.to(DOT), q, q_rest, dk, dk_rest, REST, WIDE)
    place = ((sample * keys + first) * heads + head) * DIM
    store_head(key_gradient + place, width, left, dk * NATURAL, dk_rest * NATURAL, BLOCK_K, DIM, MAIN, REST)
    store_head(value_gradient + place, width, left, dv, dv_rest, BLOCK_K, DIM, MAIN, REST)


def _blocks(dim: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Of the kernel over queries and of that over keys: what keeps both in registers."""
    if not is_half(dtype):
        return (blocks(32, 32, 8, 1),) * 2 if dim <= 64 else (blocks(32, 16, 8, 1), blocks(16, 32, 8, 1))
    if dim <= 64:
        return blocks(128, 64, 8), blocks(64, 128, 8)
    return (blocks(128, 32, 8), blocks(32, 128, 8)) if dim <= 128 else (blocks(64, 32, 8), blocks(16, 64, 8))


@operator("tbcm::fused_attention_backward")
def fused_attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, stats: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of q, k and v, in their dtypes, laid out as tokens: `out` and `stats` are of `fused_attention`."""
    q, k, v = with_rows(q), with_rows(k), with_rows(v)
    gradient, out = as_tokens(gradient), as_tokens(out)
    dq, dk, dv = in_tokens(q), in_tokens(k), in_tokens(v)
    delta = torch.empty_like(stats[0])
    of_all = q.shape[:2].numel()
    over_queries, over_keys = _blocks(q.shape[-1], q.dtype)
    shared = *sizes(q, k), *strides(q, k, v, bias)
    launch(
        _attention_query_gradient_kernel,
        (of_all * triton.cdiv(q.shape[2], over_queries["BLOCK_Q"]),),
        q, k, v, bias, out, gradient, stats, delta, dq,
        *shared,
        **constants(q, k, bias, scale, over_queries),
    )  # fmt: skip
    launch(
        _attention_key_gradient_kernel,
        (of_all * triton.cdiv(k.shape[2], over_keys["BLOCK_K"]),),
        q, k, v, bias, gradient, stats, delta, dk, dv,
        *shared,
        **constants(q, k, bias, scale, over_keys),
    )  # fmt: skip
    return dq, dk, dv
