"""What the kernels of `attention` share: their arguments, and scores."""

from __future__ import annotations

from math import e, log2
from typing import Any

import torch
from torch import Tensor

from tbcm_kernels.heads import Head, is_half, product_types
from tbcm_kernels.launch import jit, tl

LARGEST_HEAD, LARGEST_WIDE_HEAD = 256, 128
"""Columns of half-precision heads, and of fp32 ones, whose products keep their operands in registers."""
ENOUGH = 160 * 1024
"""Bytes of shared memory for two stages of wide heads: A100 and later have them, RTX 30 to 50 have 99 KiB."""


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """What the kernels cannot do of these queries, keys and values."""
    if q.dim() != 4 or k.shape != v.shape or (q.shape[:2], q.shape[3]) != (k.shape[:2], k.shape[3]) or not k.numel():
        return f"queries {list(q.shape)} with keys {list(k.shape)} and values {list(v.shape)}"
    if not q.dtype == k.dtype == v.dtype:
        return f"queries of {q.dtype} with keys of {k.dtype} and values of {v.dtype}"
    largest = LARGEST_HEAD if is_half(q.dtype) else LARGEST_WIDE_HEAD
    if q.shape[-1] > largest:
        return f"heads of {q.shape[-1]} columns of {q.dtype}, more than {largest}"
    return "a GPU before Ampere" if _is_old(q.device) else None


@torch.compiler.assume_constant_result
def _is_old(device: torch.device) -> bool:
    """Without the tensor cores that these kernels count on, and with less shared memory than they take."""
    return _is_there(device) and torch.cuda.get_device_capability(device) < (8, 0)


def _is_there(device: torch.device) -> bool:
    """Not where kernels are compiled ahead, interpreted or accounted."""
    return device.type == "cuda" and torch.cuda.is_available()


def sizes(q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
    """Queries of all heads together, heads, queries and keys."""
    return q.shape[:-1].numel(), q.shape[1], q.shape[2], k.shape[2]


def strides(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    """Of a sample, a head and a row of each, and of the bias's key too: whatever their order, nothing is copied."""
    of_bias = (0, 0, 0, 0) if bias is None else bias.expand(*q.shape[:-1], k.shape[2]).stride()
    return *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *of_bias


def blocks(queries: int, keys: int, warps: int, stages: int = 2) -> dict[str, int]:
    """What a program takes at once."""
    return {"BLOCK_Q": queries, "BLOCK_K": keys, "num_warps": warps, "num_stages": stages}


def constants(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, tile: dict[str, int]) -> dict[str, Any]:
    """The compile-time arguments that all kernels take. Weights are powers of two, which the hardware computes: `SCALE`
    makes their exponents of products, `NATURAL` is that of tangents and gradients."""
    head = Head.of(q.shape[-1], q.dtype)
    return {
        "DIM": head.dim,
        "MAIN": head.main,
        "REST": head.rest,
        "SCALE": scale * log2(e),
        "NATURAL": scale,
        "PER_QUERY": bias is not None and bias.dim() > 1 and bias.shape[-2] > 1,
        "RAGGED": k.shape[2] % tile["BLOCK_K"] != 0,
        **product_types(q.dtype),
        **_fitting(tile, q),
    }


def _fitting(tile: dict[str, int], q: Tensor) -> dict[str, int]:
    """Where shared memory is scarce, wide heads are computed on before the next are loaded."""
    if q.shape[-1] <= 64 or not _is_there(q.device):
        return tile
    room = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return tile if room >= ENOUGH else tile | {"num_stages": 1}


def in_tokens(x: Tensor) -> Tensor:
    """Room for a tensor like x [B, heads, T, d] whose memory is that of tokens, [B, T, heads, d], as networks go on."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def as_tokens(x: Tensor) -> Tensor:
    """x, or a copy of it, with such a memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@jit
def exponents(products, bias, rows, columns, row_count, column_count, b_row, b_key,
              SCALE: tl.constexpr, PER_QUERY: tl.constexpr, RAGGED: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Logarithms to base 2 of weights, of products of queries (`rows`) and keys (`columns`), whichever come first.

    Never infinite, but for keys beyond the last: a query whose bias excludes all keys sees them all alike.
    """
    s = products * SCALE
    if bias is not None:
        if PER_QUERY:
            inside = (rows < row_count) & (columns < column_count)
            b = tl.load(bias + rows * b_row + columns * b_key, mask=inside, other=0.0).to(WIDE)
        else:
            b = tl.load(bias + columns * b_key, mask=columns < column_count, other=0.0).to(WIDE)
        s += tl.maximum(b, -1e38) * 1.4426950408889634
    if RAGGED:
        s = tl.where(columns < column_count, s, float("-inf"))
    return s
