"""The kernels of `linear_attention`, plain and dual, and their launches."""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm_kernels.launch import jit, launch, tl, triton
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


@jit
def _scale_kernel(
    qkv, tangent, scale, dscale, count,
    DUAL: tl.constexpr, WIDTH: tl.constexpr, EPS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """r, and dr, of ROWS tokens."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    key = (t.to(tl.int64)[:, None] * 3 + 1) * WIDTH
    squares = tl.zeros([ROWS, BLOCK], WIDE)
    products = tl.zeros([ROWS, BLOCK], WIDE)
    for start in range(0, WIDTH, BLOCK):
        c = start + tl.arange(0, BLOCK)[None, :]
        mask = (t[:, None] < count) & (c < WIDTH)
        k = tl.load(qkv + key + c, mask=mask, other=0.0).to(WIDE)
        squares += k * k
        if DUAL:
            products += k * tl.load(tangent + key + c, mask=mask, other=0.0).to(WIDE)
    r = 1.0 / tl.sqrt(tl.sum(squares, 1) / WIDTH + EPS)
    tl.store(scale + t, r, mask=t < count)
    if DUAL:
        tl.store(dscale + t, -r * r * (r * tl.sum(products, 1) / WIDTH), mask=t < count)  # r^3 could be too small


@jit
def _state_kernel(
    qkv, tangent, norm, scale, dscale, state, dstate, tokens,
    DUAL: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, TF32: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """S and z, and their tangents, of a chunk of tokens of a head."""
    head, chunk, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    sign, size = load_norm(norm, head, DIM, BLOCK_C, WIDE)
    s = tl.zeros([BLOCK_C, BLOCK_C], WIDE)
    z = tl.zeros([BLOCK_T, BLOCK_C], WIDE)
    ds, dz = s, z
    for start in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, tokens), BLOCK_T):
        row, count = sample * tokens + start, tokens - start
        k = load_tile(qkv, 1, row, count, head, 3, HEADS, DIM, BLOCK_T, BLOCK_C, WIDE) * sign[None, :]
        v = load_tile(qkv, 2, row, count, head, 3, HEADS, DIM, BLOCK_T, BLOCK_C, WIDE)
        a = relu(k)
        if norm is not None:
            r = load_tokens(scale, row, count, BLOCK_T)
            a = r[:, None] * a
        a = rounded(a, TF32)
        s = product(tl.trans(a), v, s, TF32)
        z += a
        if DUAL:
            da = load_tile(tangent, 1, row, count, head, 3, HEADS, DIM, BLOCK_T, BLOCK_C, WIDE) * sign[None, :]
            dv = load_tile(tangent, 2, row, count, head, 3, HEADS, DIM, BLOCK_T, BLOCK_C, WIDE)
            if norm is not None:
                dr = load_tokens(dscale, row, count, BLOCK_T)
                da = r[:, None] * da + dr[:, None] * k
            da = rounded(tl.where(k > 0, da, 0.0), TF32)
            ds = product(tl.trans(da), v, ds, TF32)
            ds = product(tl.trans(a), dv, ds, TF32)
            dz += da
    index = (sample * tl.num_programs(1) + chunk) * HEADS + head
    store_state(state, index, s, tl.sum(z, 0), size, DIM, BLOCK_C)
    if DUAL:
        store_state(dstate, index, ds, tl.sum(dz, 0), size, DIM, BLOCK_C)


@jit
def _output_kernel(
    qkv, tangent, norm, state, dstate, out, dout, tokens,
    DUAL: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, EPS: tl.constexpr, WIDE: tl.constexpr,
    TF32: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of tokens of a head."""
    head, start, sample = tl.program_id(0), tl.program_id(1) * BLOCK_T, tl.program_id(2).to(tl.int64)
    row, count = sample * tokens + start, tokens - start
    sign, size = load_norm(norm, head, DIM, BLOCK_C, WIDE)
    s, z = load_state(state, sample * HEADS + head, size, DIM, BLOCK_C)
    q = load_tile(qkv, 0, row, count, head, 3, HEADS, DIM, BLOCK_T, BLOCK_C, WIDE)
    u, divisor, y = attend(q, sign, s, z, norm is not None, EPS, DIM, TF32)
    store_tile(out, y, 0, row, count, head, 1, HEADS, DIM, BLOCK_T, BLOCK_C)
    if DUAL:
        ds, dz = load_state(dstate, sample * HEADS + head, size, DIM, BLOCK_C)
        dq = load_tile(tangent, 0, row, count, head, 3, HEADS, DIM, BLOCK_T, BLOCK_C, WIDE)
        du = tl.where(u > 0, dq * sign[None, :], 0.0)
        dy = state_product(du, s, TF32) + state_product(u, ds, TF32)
        dy -= y * tl.sum(du * z[None, :] + u * dz[None, :], 1)[:, None]
        store_tile(dout, dy / divisor[:, None], 0, row, count, head, 1, HEADS, DIM, BLOCK_T, BLOCK_C)


def forward(
    qkv: Tensor,
    tangent: Tensor | None,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    eps: float,
    heads: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """out and its tangent [B, T, D], key's scale [B, T] and the state [B, heads, d + 1, d], z in its last row."""
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    dual = tangent is not None
    qkv, tangent = qkv.contiguous(), None if tangent is None else tangent.contiguous()
    looped, single = (constants(qkv, heads, loop=loop) for loop in (True, False))
    sums, dim = torch.promote_types(qkv.dtype, torch.float32), width // heads
    out = qkv.new_empty(batch, tokens, width, dtype=dtype)
    scale = qkv.new_empty((0,) if norm_k is None else (batch, tokens), dtype=sums)
    dout, dscale = (torch.empty_like(out), torch.empty_like(scale)) if dual else (None, None)
    if norm_k is not None:
        launch(
            _scale_kernel, (triton.cdiv(batch * tokens, 8),), qkv, tangent, scale, dscale, batch * tokens,
            DUAL=dual, WIDTH=width, EPS=eps, WIDE=single["WIDE"], ROWS=8, BLOCK=256,
        )  # fmt: skip
    chunks = triton.cdiv(tokens, CHUNK)
    state = qkv.new_empty(batch, chunks, heads, dim + 1, dim, dtype=sums)
    dstate = torch.empty_like(state) if dual else None
    launch(
        _state_kernel, (heads, chunks, batch), qkv, tangent, norm_k, scale, dscale, state, dstate, tokens,
        DUAL=dual, CHUNK=CHUNK, **looped,
    )  # fmt: skip
    state, dstate = state.sum(1), None if dstate is None else dstate.sum(1)
    launch(
        _output_kernel, (heads, triton.cdiv(tokens, single["BLOCK_T"]), batch),
        qkv, tangent, norm_q, state, dstate, out, dout, tokens,
        DUAL=dual, EPS=eps, **single,
    )  # fmt: skip
    return out, dout, scale, state
