"""Gradients of `linear_attention`.

In the terms of `tbcm_kernels.linear_attention`, with g the gradient of out, h = g / (u z + guard) and e = -sum(h out):

    of u: h S^T + e z,      of S: dS = sum_q u^T h,      of z: dz = sum_q e u
    of a: v dS^T + dz,      of v: a dS

One kernel goes over the queries (dq, and partial sums of dS and dz over chunks of tokens), a second over the keys and
values. Key's norm runs across heads: before the second, another sums over channels what reaches each token's scale.
Query's norm needs no such sum, as out does not depend on the length of a query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels.launch import jit, launch, operator, tl, triton
from tbcm_kernels.linear_attention_tiles import (
    CHUNK,
    attend,
    constants,
    load_norm,
    load_state,
    load_tile,
    load_tokens,
    product,
    relu,
    rounded,
    state_product,
    store_state,
    store_tile,
)


@operator("tbcm::linear_attention_backward")
def linear_attention_backward(
    gradient: Tensor,
    qkv: Tensor,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    scale: Tensor,
    state: Tensor,
    eps: float,
    heads: int,
) -> list[Tensor]:
    """Gradients of qkv, and of those of norm_q and norm_k that there are, given the gradient of out and what the
    operator saved: key's scale [B, T] and the state [B, heads, d + 1, d]."""
    batch, tokens, width = gradient.shape
    gradient, qkv = gradient.contiguous(), qkv.contiguous()
    dqkv = torch.empty_like(qkv)
    looped, single = (constants(qkv, heads, loop=loop) for loop in (True, False))
    chunks, blocks = triton.cdiv(tokens, CHUNK), triton.cdiv(tokens, single["BLOCK_T"])
    dstate = state.new_empty(batch, chunks, *state.shape[1:])
    dnorm_q = None if norm_q is None else state.new_empty(batch * chunks, width)
    dnorm_k = None if norm_k is None else state.new_empty(batch * blocks, width)
    dscale = None if norm_k is None else state.new_empty(batch, heads, tokens)
    launch(
        _query_backward_kernel, (heads, chunks, batch), gradient, qkv, norm_q, state, dqkv, dstate, dnorm_q, tokens,
        EPS=eps, CHUNK=CHUNK, **looped,
    )  # fmt: skip
    dstate = dstate.sum(1)
    if dscale is not None:
        launch(_scale_backward_kernel, (heads, blocks, batch), qkv, norm_k, dstate, dscale, tokens, **single)
        dscale = dscale.sum(1)
    launch(
        _key_backward_kernel, (heads, blocks, batch), qkv, norm_k, scale, dscale, dstate, dqkv, dnorm_k, tokens,
        **single,
    )  # fmt: skip
    # What kernels leave is weight x gradient. Where a weight is zero nothing passes the ReLU.
    norms = [
        torch.where(weight == 0, 0, partials.sum(0) / weight).to(weight.dtype)
        for weight, partials in ((norm_q, dnorm_q), (norm_k, dnorm_k))
        if weight is not None and partials is not None
    ]
    return [dqkv, *norms]


@jit
def _query_backward_kernel(
    gradient, qkv, norm, state, dqkv, dstate, dnorm, tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, EPS: tl.constexpr, WIDE: tl.constexpr, TF32: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A chunk of tokens of a head: dq, and the chunk's part of the gradients of the state and of the norm's weights."""
    head, chunk, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    sign, size = load_norm(norm, head, DIM, BLOCK_C, WIDE)
    s, z = load_state(state, sample * HEADS + head, size, DIM, BLOCK_C)
    ds = tl.zeros([BLOCK_C, BLOCK_C], WIDE)
    dz = tl.zeros([BLOCK_T, BLOCK_C], WIDE)
    dw = tl.zeros([BLOCK_T, BLOCK_C], WIDE)
    for start in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, tokens), BLOCK_T):
        row, count = sample * tokens + start, tokens - start
        q = load_tile(qkv, 0, row, count, head, 3, HEADS, DIM, BLOCK_T, BLOCK_C, WIDE)
        g = load_tile(gradient, 0, row, count, head, 1, HEADS, DIM, BLOCK_T, BLOCK_C, WIDE)
        u, divisor, out = attend(q, sign, s, z, norm is not None, EPS, DIM, TF32)
        h = rounded(g / divisor[:, None], TF32)
        e = -tl.sum(h * out, 1)  # of the rounded h: where all keys are alike the two terms of du still cancel
        du = tl.where(u > 0, state_product(h, tl.trans(s), TF32) + e[:, None] * z[None, :], 0.0)
        store_tile(dqkv, du * sign[None, :], 0, row, count, head, 3, HEADS, DIM, BLOCK_T, BLOCK_C)
        ds = product(tl.trans(u), h, ds, TF32)
        dz += u * e[:, None]
        if norm is not None:
            dw += u * du
    place = sample * tl.num_programs(1) + chunk
    # The state holds k's norm alone: of u, `size` was lent to it.
    store_state(dstate, place * HEADS + head, ds, tl.sum(dz, 0), size, DIM, BLOCK_C)
    if norm is not None:
        c = tl.arange(0, BLOCK_C)
        tl.store(dnorm + (place * HEADS + head) * DIM + c, tl.sum(dw, 0), mask=c < DIM)


@jit
def _scale_backward_kernel(
    qkv, norm, dstate, dscale, tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, TF32: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A head's part [B, heads, T] of the gradient of key's scale."""
    head, start, sample = tl.program_id(0), tl.program_id(1) * BLOCK_T, tl.program_id(2).to(tl.int64)
    row, count = sample * tokens + start, tokens - start
    sign, size = load_norm(norm, head, DIM, BLOCK_C, WIDE)
    ds, dz = load_state(dstate, sample * HEADS + head, size, DIM, BLOCK_C)
    k = load_tile(qkv, 1, row, count, head, 3, HEADS, DIM, BLOCK_T, BLOCK_C, WIDE)
    v = load_tile(qkv, 2, row, count, head, 3, HEADS, DIM, BLOCK_T, BLOCK_C, WIDE)
    da = state_product(v, tl.trans(ds), TF32) + dz[None, :]
    t = tl.arange(0, BLOCK_T)
    at = dscale + (sample * HEADS + head) * tokens + start + t
    tl.store(at, tl.sum(relu(k * sign[None, :]) * da, 1), mask=t < count)


@jit
def _key_backward_kernel(
    qkv, norm, scale, dscale, dstate, dqkv, dnorm, tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, TF32: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of tokens of a head: dk and dv, and the block's part of the gradient of the norm's weights."""
    head, block, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = block * BLOCK_T
    row, count = sample * tokens + start, tokens - start
    sign, size = load_norm(norm, head, DIM, BLOCK_C, WIDE)
    ds, dz = load_state(dstate, sample * HEADS + head, size, DIM, BLOCK_C)
    k = load_tile(qkv, 1, row, count, head, 3, HEADS, DIM, BLOCK_T, BLOCK_C, WIDE)
    v = load_tile(qkv, 2, row, count, head, 3, HEADS, DIM, BLOCK_T, BLOCK_C, WIDE)
    a = relu(k * sign[None, :])
    da = tl.where(a > 0, state_product(v, tl.trans(ds), TF32) + dz[None, :], 0.0)
    dk = da * sign[None, :]
    dv = state_product(a, ds, TF32)
    if norm is not None:
        r = load_tokens(scale, row, count, BLOCK_T)
        slope = r * r * (r * load_tokens(dscale, row, count, BLOCK_T) / (HEADS * DIM))  # r^3 could be too small
        dk = r[:, None] * dk - slope[:, None] * k
        dv = r[:, None] * dv
        c = tl.arange(0, BLOCK_C)
        at = dnorm + (sample * tl.num_programs(1) + block) * (HEADS * DIM) + head * DIM + c
        tl.store(at, tl.sum(r[:, None] * a * da, 0), mask=c < DIM)
    store_tile(dqkv, dk, 1, row, count, head, 3, HEADS, DIM, BLOCK_T, BLOCK_C)
    store_tile(dqkv, dv, 2, row, count, head, 3, HEADS, DIM, BLOCK_T, BLOCK_C)
