"""What the kernels of `linear_attention` share: how they cut up their tensors, and their products."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tbcm_kernels.launch import jit, tl, triton, wide

CHUNK = 256  # tokens that a program adds up: sums over tokens do not depend on the batch


def constants(qkv: Tensor, heads: int, *, loop: bool) -> dict[str, Any]:
    """The compile-time arguments that kernels take: for one that goes over a chunk and keeps a state in registers
    (`loop`), or for one of a block of tokens. The same for the plain and the dual operator, whose values are equal in
    all bits."""
    dim = qkv.shape[-1] // 3 // heads
    columns = max(16, triton.next_power_of_2(dim))
    return {
        "HEADS": heads,
        "DIM": dim,
        "BLOCK_T": max(16, (1024 if loop else 2048) // columns),
        "BLOCK_C": columns,
        "WIDE": wide(qkv.dtype),
        "TF32": qkv.element_size() == 2,
        "num_warps": 4 if columns <= 32 else 8,
    }


@jit
def load_tile(base, part, row, count, head, PARTS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
              BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """A head's columns of `count` rows from `row`, of the `part`-th of PARTS tensors side by side: zero beyond them."""
    t, c = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_C)[None, :]
    at = base + ((row + t) * PARTS + part) * (HEADS * DIM) + head * DIM + c
    return tl.load(at, mask=(t < count) & (c < DIM), other=0.0).to(WIDE)


@jit
def store_tile(base, x, part, row, count, head, PARTS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
               BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    t, c = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_C)[None, :]
    at = base + ((row + t) * PARTS + part) * (HEADS * DIM) + head * DIM + c
    tl.store(at, x.to(base.dtype.element_ty), mask=(t < count) & (c < DIM))


@jit
def load_tokens(base, row, count, BLOCK_T: tl.constexpr):
    t = tl.arange(0, BLOCK_T)
    return tl.load(base + row + t, mask=t < count, other=0.0)


@jit
def load_norm(norm, head, DIM: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    """Signs and sizes of a head's weights; without a norm, ones."""
    c = tl.arange(0, BLOCK_C)
    if norm is None:
        weight = tl.full([BLOCK_C], 1.0, WIDE)
    else:
        weight = tl.load(norm + head * DIM + c, mask=c < DIM, other=0.0).to(WIDE)
    sign = tl.where(weight > 0, 1.0, tl.where(weight < 0, -1.0, 0.0)).to(WIDE)
    return sign, tl.abs(weight)


@jit
def load_state(base, index, size, DIM: tl.constexpr, BLOCK_C: tl.constexpr):
    """S (rows are k's channels, columns v's) and z of the `index`-th head, k's channels times `size`."""
    c = tl.arange(0, BLOCK_C)
    i, j = c[:, None], c[None, :]
    at = base + index * ((DIM + 1) * DIM)
    state = tl.load(at + i * DIM + j, mask=(i < DIM) & (j < DIM), other=0.0)
    sums = tl.load(at + DIM * DIM + c, mask=c < DIM, other=0.0)
    return state * size[:, None], sums * size


@jit
def store_state(base, index, state, sums, size, DIM: tl.constexpr, BLOCK_C: tl.constexpr):
    c = tl.arange(0, BLOCK_C)
    i, j = c[:, None], c[None, :]
    at = base + index * ((DIM + 1) * DIM)
    tl.store(at + i * DIM + j, state * size[:, None], mask=(i < DIM) & (j < DIM))
    tl.store(at + DIM * DIM + c, sums * size, mask=c < DIM)


@jit
def rounded(x, TF32: tl.constexpr):
    """To the nearest of tf32's numbers, where a product would cut x off. NaN stays."""
    if TF32:
        bits = x.to(tl.int32, bitcast=True) + 0x1000
        return tl.where(x == x, (bits & -0x2000).to(tl.float32, bitcast=True), x)
    return x


@jit
def product(x, y, acc, TF32: tl.constexpr):
    """acc + x y: of tf32 numbers, or as good as in fp32."""
    if TF32:
        return tl.dot(x, y, acc, input_precision="tf32", out_dtype=acc.dtype)
    return tl.dot(x, y, acc, input_precision="tf32x3", out_dtype=acc.dtype)


@jit
def state_product(x, state, TF32: tl.constexpr):
    """x S, of S in two tf32 parts, so that its error is fp32's: x should be a tf32 number."""
    acc = tl.zeros([x.shape[0], state.shape[1]], x.dtype)
    if TF32:
        high = rounded(state, TF32)
        acc = product(x, rounded(state - high, TF32), acc, TF32)
        return product(x, high, acc, TF32)
    return product(x, state, acc, TF32)


@jit
def relu(x):
    return tl.where(x <= 0, 0.0, x)  # NaN stays


@jit
def attend(q, sign, state, sums, NORMED: tl.constexpr, EPS: tl.constexpr, DIM: tl.constexpr, TF32: tl.constexpr):
    """u, the divisor u z + guard, and out."""
    u = relu(q * sign[None, :])
    divisor = tl.sum(u * sums[None, :], 1)
    if NORMED:
        divisor += 1e-15 * tl.sqrt(tl.sum(q * q, 1) / DIM + EPS)
    else:
        divisor += 1e-15
    return u, divisor, state_product(u, state, TF32) / divisor[:, None]
