"""Gradients of the norm of `norm_modulate` and `residual_norm_modulate`.

With n and s from the forward pass, dy the gradient of y and dn = dy (1 + scale):

    dh = (dn - mean(dn) - n mean(n dn)) / s + the residual stream's own gradient,    dx = gate dh
    dshift = sum dy,    dscale = sum n dy,    dgate = sum x dh

the sums over the tokens of a sample. A program takes a run of tokens, keeps its sums in registers and writes
them once; there are as many programs as run at a time. A second pass adds a sample's sums in a fixed order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from tbcm_kernels.launch import jit, launch, operator, tl, triton, wide

_FEWEST_TOKENS = 16  # of a program, so that its sums weigh little against its tokens
_REGISTERS = 128  # of a thread: enough for Sana's widths, and 16 warps fit a multiprocessor
_WARPS = 16
_WIDE = 2048  # columns: more, of as many warps, take over 128 registers where nothing limits them


def row_constants(width: int, *tensors: Tensor | None) -> dict[str, Any]:
    """How a program holds a row of `width` columns of each of `tensors`: in vectors of 16 bytes of the widest dtype, up
    to 20 columns a thread. As the width is a constant, what lies beyond it is left out when the kernel is compiled."""
    given = [tensor for tensor in tensors if tensor is not None]
    itemsize = max(tensor.element_size() for tensor in given)
    vector = max(16 // itemsize, 1)
    return {
        "D": width,
        "BLOCK": max(triton.next_power_of_2(width), vector),
        "VECTOR": vector,
        "WIDE": wide(given[0].dtype),
        "num_warps": min(triton.next_power_of_2(triton.cdiv(width, 640)), 16),
    }


def vector(x: Tensor | None) -> tuple[Tensor | None, int]:
    """One [B, 1, D] as kernels take it, with contiguous columns, and the distance of two samples."""
    if x is None:
        return None, 0
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, x.stride(0)


@jit
def columns_of(BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """The columns of a row as [BLOCK / VECTOR, VECTOR]: a thread holds VECTOR neighbours, whatever the dtype, so that
    tensors of different dtypes lie alike and nothing moves between threads."""
    return tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@jit
def row_sum(x):
    """Of all columns."""
    return tl.sum(tl.sum(x, axis=1), axis=0)


@jit
def _norm_modulate_backward_kernel(
    stream_gradient, gradient, h, x, gate, scale, stats, dh, dx, partials,
    gate_stride, scale_stride, tokens, run,
    D: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """`run` tokens of a sample. Without a stream_gradient, gate or dx their terms are left out."""
    sample = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * run
    last = tl.minimum(first + run, tokens)
    columns = columns_of(BLOCK, VECTOR)
    inside = columns < D
    factor = 1.0 + tl.load(scale + sample * scale_stride + columns, mask=inside, other=0.0).to(WIDE)
    to_shift = tl.zeros([BLOCK // VECTOR, VECTOR], WIDE)
    to_scale = to_shift
    to_gate = to_shift
    g = to_shift
    if gate is not None:
        g = tl.load(gate + sample * gate_stride + columns, mask=inside, other=0.0).to(WIDE)

    for token in range(first, last):
        row = sample * tokens + token
        at = row * D
        dy = tl.load(gradient + at + columns, mask=inside, other=0.0).to(WIDE)
        inverse = tl.load(stats + row * 2 + 1)
        normal = tl.load(h + at + columns, mask=inside, other=0.0).to(WIDE) - tl.load(stats + row * 2)
        normal *= inverse
        total = to_shift
        branch = to_shift
        if stream_gradient is not None:
            total = tl.load(stream_gradient + at + columns, mask=inside, other=0.0).to(WIDE)
        if gate is not None:
            branch = tl.load(x + at + columns, mask=inside, other=0.0).to(WIDE)
        to_shift += dy
        to_scale += dy * normal
        dn = dy * factor
        of_norm = inverse * (dn - row_sum(dn) / D - normal * (row_sum(dn * normal) / D))
        total = of_norm if stream_gradient is None else total + of_norm
        tl.store(dh + at + columns, total, mask=inside)
        if gate is not None:
            to_gate += branch * total
            total = g * total
        if dx is not None:
            tl.store(dx + at + columns, total, mask=inside)

    at = (sample * tl.num_programs(1) + tl.program_id(1)) * (SUMS * D)
    tl.store(partials + at + columns, to_shift, mask=inside)
    tl.store(partials + at + D + columns, to_scale, mask=inside)
    if SUMS == 3:
        tl.store(partials + at + 2 * D + columns, to_gate, mask=inside)


@operator("tbcm::norm_modulate_backward")
def norm_modulate_backward(
    stream_gradient: Tensor | None, gradient: Tensor, h: Tensor, scale: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of h, and [B, 2, D] of shift and scale, at least in fp32, given that of y and, if h is a residual
    stream, its own."""
    dh, _, sums = _launch(stream_gradient, gradient, h, None, None, scale, stats, None)
    return dh, sums


@operator("tbcm::residual_norm_modulate_backward")
def residual_norm_modulate_backward(
    stream_gradient: Tensor | None,
    gradient: Tensor,
    h: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    stats: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of h and, as `dtype`, of x, and [B, 3, D] of shift, scale and gate, given those of the sum
    `h` and of its norm. Without a gate x is not needed, and the sums are [B, 2, D]."""
    dh, dx, sums = _launch(stream_gradient, gradient, h, x, gate, scale, stats, dtype)
    assert dx is not None
    return dh, dx, sums


def _launch(
    stream_gradient: Tensor | None,
    gradient: Tensor,
    h: Tensor,
    x: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    stats: Tensor,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Without a `dtype` there is no gradient of x."""
    samples, tokens, width = h.shape
    constants = row_constants(width, h, x, gradient)
    constants["num_warps"] *= (1 if gate is None else 2) * (2 if constants["BLOCK"] > _WIDE else 1)
    warps = constants["num_warps"] = min(constants["num_warps"], 16)
    places = max(_WARPS // warps, 1) * _multiprocessors(h.device)
    run = max(triton.cdiv(tokens, max(places // max(samples, 1), 1)), _FEWEST_TOKENS)
    runs, sums = triton.cdiv(tokens, run), 2 if gate is None else 3
    dh = h.new_empty(h.shape)
    dx = None if dtype is None else h.new_empty(h.shape, dtype=dtype)
    partials = stats.new_empty((samples, runs, sums, width))
    streams = [None if t is None else t.contiguous() for t in (stream_gradient, gradient, h, x)]
    (gate, gate_stride), (strided, scale_stride) = vector(gate), vector(scale)
    launch(
        _norm_modulate_backward_kernel, (samples, runs), *streams, gate, strided, stats.contiguous(), dh, dx, partials,
        gate_stride, scale_stride, tokens, run, SUMS=sums, maxnreg=_REGISTERS, **constants,
    )  # fmt: skip
    return dh, dx, partials.sum(1)


@cache
def _multiprocessors(device: torch.device) -> int:
    """An H100's where there is no GPU: tensors on one may be only traced there."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
