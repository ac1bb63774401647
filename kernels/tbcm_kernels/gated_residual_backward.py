"""Gradients of `gated_residual`: given h's, which is that of the sum, dx = gate dh and dgate = sum x dh over tokens.

A program takes a strip of columns over a run of tokens and writes what it adds to dgate once; a second pass adds what a
sample's programs wrote, in a fixed order. h's gradient is the sum's own and is not copied, but where the sum's copy has
one too: both are added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbcm_kernels.launch import jit, launch, operator, tl, triton, wide
from tbcm_kernels.norm_modulate_backward import vector

ROWS = 16
_TILES = 4  # of a program, one below the other


def tile_constants(width: int, *tensors: Tensor) -> dict[str, Any]:
    """A tile of ROWS tokens by at most 128 columns, in vectors of 16 bytes of the widest dtype."""
    length = max(16 // max(tensor.element_size() for tensor in tensors), 1)
    columns = max(min(triton.next_power_of_2(width), 128), length)
    return {
        "D": width,
        "ROWS": ROWS,
        "COLUMNS": columns,
        "VECTOR": length,
        "WIDE": wide(tensors[0].dtype),
        "num_warps": 4,
    }


@jit
def tile(ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr):
    """Rows and columns of a tile as [ROWS COLUMNS / VECTOR, VECTOR], see `columns_of`."""
    places = tl.arange(0, ROWS * COLUMNS // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    return places // COLUMNS, places % COLUMNS


@jit
def _gated_residual_backward_kernel(
    gradient, of_copy, gate, x, both, dx, partials, gate_stride, tokens,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    strips: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    run, sample = tl.program_id(0) // strips, tl.program_id(1).to(tl.int64)
    strip = tl.program_id(0) % strips * COLUMNS
    rows, columns = tile(ROWS, COLUMNS, VECTOR)
    columns += strip
    g = tl.load(gate + sample * gate_stride + columns, mask=columns < D, other=0.0).to(WIDE)
    to_gate = tl.zeros([ROWS * COLUMNS // VECTOR, VECTOR], WIDE)
    first = run * (TILES * ROWS)
    for _ in range(TILES):
        start = (sample * tokens + first) * D
        inside = (first + rows < tokens) & (columns < D)
        dh = tl.load(gradient + start + rows * D + columns, mask=inside, other=0.0).to(WIDE)
        if of_copy is not None:
            dh += tl.load(of_copy + start + rows * D + columns, mask=inside, other=0.0).to(WIDE)
            tl.store(both + start + rows * D + columns, dh, mask=inside)
        to_gate += dh * tl.load(x + start + rows * D + columns, mask=inside, other=0.0).to(WIDE)
        tl.store(dx + start + rows * D + columns, g * dh, mask=inside)
        first += ROWS
    total = tl.sum(tl.reshape(to_gate, [ROWS, COLUMNS]), axis=0)
    columns = strip + tl.arange(0, COLUMNS)
    at = (sample * (tl.num_programs(0) // strips) + run) * D + columns
    tl.store(partials + at, total, mask=columns < D)


@operator("tbcm::gated_residual_backward")
def gated_residual_backward(
    gradient: Tensor, of_copy: Tensor | None, gate: Tensor, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and of the gate, given those of the sum and of its copy; and of both together, in the dtype of
    the first (without elements where it is alone)."""
    samples, tokens, width = x.shape
    gradient, x = gradient.contiguous(), x.contiguous()
    of_copy = None if of_copy is None else of_copy.contiguous()
    strided, stride = vector(gate)
    constants = tile_constants(width, gradient, x)
    strips, runs = triton.cdiv(width, constants["COLUMNS"]), triton.cdiv(tokens, _TILES * ROWS)
    dx, both = torch.empty_like(x), gradient.new_empty(0 if of_copy is None else gradient.shape)
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    partials = x.new_empty((samples, runs, width), dtype=dtype)
    arguments = gradient, of_copy, strided, x, None if of_copy is None else both, dx, partials, stride, tokens
    launch(_gated_residual_backward_kernel, (strips * runs, samples), *arguments, TILES=_TILES, **constants)
    return dx, partials.sum(1, keepdim=True).to(gate.dtype), both
