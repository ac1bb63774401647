"""Gradients of `cross_attention`, and what its kernels share.

With weights p = exp(s - m) / l, recomputed from the scores s and each query's greatest score m and sum l, and with a
gradient g of the output:

    dv = p^T g,   ds = p (g v^T - sum(g out)) / sqrt(d),   dq = ds k,   dk = ds^T q

One kernel goes over the queries (dq, and sum(g out) of each), a second over the keys (dk, dv). A prompt's keys are few
and its queries many: the second splits the queries between programs, whose partial sums are added in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbcm_kernels.heads import Head, inner, is_half, load_head, outer, product_types, store_head, with_rows, zero_head
from tbcm_kernels.launch import jit, launch, operator, tl, triton

_PROGRAMS = 512  # of the kernel over the keys: some for each multiprocessor of a large GPU
_FEWEST_QUERIES = 512  # that are worth a program there, as each reads and writes its partial sums


def head_constants(key: Tensor, value: Tensor, heads: int) -> dict[str, Any]:
    """The compile-time arguments that all kernels take.

    Products are taken in `value`'s dtype, as autocast would: behind a normalisation queries and keys are fp32.
    """
    head = Head.of(key.shape[-1] // heads, value.dtype)
    return {
        "HEADS": heads,
        "DIM": head.dim,
        "MAIN": head.main,
        "REST": head.rest,
        "SCALE": head.dim**-0.5,
        **product_types(value.dtype),
    }


def queries_per_prompt(query: Tensor, key: Tensor) -> int:
    return query.shape[0] * query.shape[1] // max(key.shape[0], 1)


@jit
def _query_gradient_kernel(
    query, key, value, bias, out, gradient, stats, delta, query_gradient,
    total, queries, keys, key_batch, key_row, value_batch, value_row,
    HEADS: tl.constexpr, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, SCALE: tl.constexpr,
    WIDE: tl.constexpr, DOT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dq and delta of BLOCK_Q queries of a head."""
    head = tl.program_id(0) % HEADS
    first = tl.program_id(0) // HEADS * BLOCK_Q
    prompt = tl.program_id(1).to(tl.int64)
    width = HEADS * DIM
    count = queries - first
    rows = tl.arange(0, BLOCK_Q)
    row = prompt * queries + first
    place = row * width + head * DIM
    q, q_rest = load_head(query + place, width, count, BLOCK_Q, DIM, MAIN, REST, DOT)
    g, g_rest = load_head(gradient + place, width, count, BLOCK_Q, DIM, MAIN, REST, WIDE)
    o, o_rest = load_head(out + place, width, count, BLOCK_Q, DIM, MAIN, REST, WIDE)
    dq, dq_rest = zero_head(BLOCK_Q, MAIN, REST, WIDE)
    d = tl.sum(g * o, 1)
    if REST > 0:
        d += tl.sum(g_rest * o_rest, 1)
    g, g_rest = g.to(DOT), g_rest.to(DOT)
    stat = head.to(tl.int64) * total + row + rows
    tl.store(delta + stat, d, mask=rows < count)
    peak = tl.load(stats + stat, mask=rows < count, other=0.0)
    share = 1.0 / tl.load(stats + HEADS * total + stat, mask=rows < count, other=1.0)
    for start in range(0, keys, BLOCK_K):
        left = keys - start
        places = start + tl.arange(0, BLOCK_K)
        at = key + prompt * key_batch + start * key_row + head * DIM
        k, k_rest = load_head(at, key_row, left, BLOCK_K, DIM, MAIN, REST, DOT)
        at = value + prompt * value_batch + start * value_row + head * DIM
        v, v_rest = load_head(at, value_row, left, BLOCK_K, DIM, MAIN, REST, DOT)
        b = tl.load(bias + prompt * keys + places, mask=places < keys, other=float("-inf")).to(WIDE)
        s = inner(q, q_rest, k, k_rest, REST, WIDE) * SCALE + b[None, :]
        p = tl.exp(s - peak[:, None]) * share[:, None]
        ds = (p * (inner(g, g_rest, v, v_rest, REST, WIDE) - d[:, None])).to(DOT)
        dq, dq_rest = outer(ds, k, k_rest, dq, dq_rest, REST, WIDE)
    store_head(query_gradient + place, width, count, dq * SCALE, dq_rest * SCALE, BLOCK_Q, DIM, MAIN, REST)


@jit
def _text_gradient_kernel(
    query, key, value, bias, gradient, stats, delta, key_gradient, value_gradient,
    total, prompts, queries, keys, key_batch, key_row, value_batch, value_row, share_of_queries,
    HEADS: tl.constexpr, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, SCALE: tl.constexpr,
    WIDE: tl.constexpr, DOT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_K keys of a head, from one share of the prompt's queries. Scores are transposed."""
    head = tl.program_id(0) % HEADS
    first = tl.program_id(0) // HEADS * BLOCK_K
    split = tl.program_id(1).to(tl.int64)
    prompt = tl.program_id(2).to(tl.int64)
    width = HEADS * DIM
    left = keys - first
    at = key + prompt * key_batch + first * key_row + head * DIM
    k, k_rest = load_head(at, key_row, left, BLOCK_K, DIM, MAIN, REST, DOT)
    at = value + prompt * value_batch + first * value_row + head * DIM
    v, v_rest = load_head(at, value_row, left, BLOCK_K, DIM, MAIN, REST, DOT)
    places = first + tl.arange(0, BLOCK_K)
    b = tl.load(bias + prompt * keys + places, mask=places < keys, other=float("-inf")).to(WIDE)
    dk, dk_rest = zero_head(BLOCK_K, MAIN, REST, WIDE)
    dv, dv_rest = zero_head(BLOCK_K, MAIN, REST, WIDE)
    begin = tl.program_id(1) * share_of_queries
    end = tl.minimum(begin + share_of_queries, queries)
    for start in range(begin, end, BLOCK_Q):
        count = queries - start
        row = prompt * queries + start
        place = row * width + head * DIM
        q, q_rest = load_head(query + place, width, count, BLOCK_Q, DIM, MAIN, REST, DOT)
        g, g_rest = load_head(gradient + place, width, count, BLOCK_Q, DIM, MAIN, REST, DOT)
        rows = tl.arange(0, BLOCK_Q)
        stat = head.to(tl.int64) * total + row + rows
        # Beyond the last query a greatest score of infinity makes weights of zero.
        peak = tl.load(stats + stat, mask=rows < count, other=float("inf"))
        share = 1.0 / tl.load(stats + HEADS * total + stat, mask=rows < count, other=1.0)
        d = tl.load(delta + stat, mask=rows < count, other=0.0)
        s = inner(k, k_rest, q, q_rest, REST, WIDE) * SCALE + b[:, None]
        p = tl.exp(s - peak[None, :]) * share[None, :]
        ds = (p * (inner(v, v_rest, g, g_rest, REST, WIDE) - d[None, :])).to(DOT)
        dv, dv_rest = outer(p.to(DOT), g, g_rest, dv, dv_rest, REST, WIDE)
        dk, dk_rest = outer(ds, q, q_rest, dk, dk_rest, REST, WIDE)
    place = ((split * prompts + prompt) * keys + first) * width + head * DIM
    store_head(key_gradient + place, width, left, dk * SCALE, dk_rest * SCALE, BLOCK_K, DIM, MAIN, REST)
    store_head(value_gradient + place, width, left, dv, dv_rest, BLOCK_K, DIM, MAIN, REST)


def _blocks(dim: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Of the kernel over queries and of that over keys: what keeps both in registers."""
    if not is_half(dtype):
        small = {"BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}
        return small, small
    over_queries = {"BLOCK_Q": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    over_keys = {"BLOCK_Q": 32, "BLOCK_K": 64, "num_warps": 8 if dim > 96 else 4, "num_stages": 2}
    return over_queries, over_keys


@operator("tbcm::cross_attention_backward")
def cross_attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, out: Tensor, stats: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of query [P n, T, D], key and value [P, L, D], contiguous and in their dtypes."""
    prompts, keys, width = key.shape
    queries, total = queries_per_prompt(query, key), query.shape[0] * query.shape[1]
    gradient, query, key, value = gradient.contiguous(), query.contiguous(), with_rows(key), with_rows(value)
    bias = bias.expand(prompts, 1, keys).contiguous()
    constants = head_constants(key, value, heads)
    over_queries, over_keys = _blocks(width // heads, value.dtype)
    strides = key.stride(0), key.stride(1), value.stride(0), value.stride(1)
    delta = torch.empty_like(stats[0])
    query_gradient = torch.empty_like(query)
    launch(
        _query_gradient_kernel,
        (heads * triton.cdiv(queries, over_queries["BLOCK_Q"]), prompts),
        query, key, value, bias, out, gradient, stats, delta, query_gradient,
        total, queries, keys, *strides,
        **constants, **over_queries,
    )  # fmt: skip
    blocks = heads * triton.cdiv(keys, over_keys["BLOCK_K"])
    splits = max(1, min(_PROGRAMS // max(blocks * prompts, 1), queries // _FEWEST_QUERIES))
    share = triton.cdiv(triton.cdiv(queries, splits), over_keys["BLOCK_Q"]) * over_keys["BLOCK_Q"]
    dtypes = (key.dtype, value.dtype) if splits == 1 else (stats.dtype, stats.dtype)
    text_gradients = [key.new_empty(splits, prompts, keys, width, dtype=dtype) for dtype in dtypes]
    launch(
        _text_gradient_kernel,
        (blocks, splits, prompts),
        query, key, value, bias, gradient, stats, delta, *text_gradients,
        total, prompts, queries, keys, *strides, share,
        **constants, **over_keys,
    )  # fmt: skip
    dk, dv = text_gradients if splits == 1 else (partial.sum(0, keepdim=True) for partial in text_gradients)
    return query_gradient, dk[0].to(key.dtype), dv[0].to(value.dtype)
