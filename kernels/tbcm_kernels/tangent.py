"""The normalised tangent of the consistency objective (TBCM, Eq. 4 and Algorithm 1), and its norm, sample by sample.

    g = -cos^2(t) (sigma_d F - dx/dt) - r (cos t sin t x_t + sigma_d dF),    g <- g / (||g||_2 + c)

F is the student's own prediction, dF = cos t sin t dF/dt its derivative along the trajectory, sigma_d the data's
standard deviation; the norm is over C, H, W. There is no gradient: the objective takes g as a constant.

Two kernels: the first writes g before its normalisation and each chunk's sum of squares; the second adds a sample's
sums, always in the same order, and divides g where it lies, by then in the L2 cache. How a sample is cut does not
depend on the batch, so its tangent does not either.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tbcm_kernels.catalog import Cost, Operator, Size, nbytes
from tbcm_kernels.dispatch import fused
from tbcm_kernels.launch import jit, launch, operator, tl, triton, wide


def reference(
    F: Tensor, dF: Tensor, x: Tensor, dxdt: Tensor, t: Tensor, r: float, sigma_data: float, c: float = 0.1
) -> tuple[Tensor, Tensor]:
    """`tangent` in plain PyTorch."""
    t = t[:, None, None, None]
    cos, sin = torch.cos(t), torch.sin(t)
    g = -(cos**2) * (sigma_data * F - dxdt) - r * (cos * sin * x + sigma_data * dF)
    norm = torch.linalg.vector_norm(g, dim=(1, 2, 3))
    return g / (norm[:, None, None, None] + c), norm


@jit
def _direction_kernel(F, dF, x, dxdt, t, g, sums, r, sigma_data, size, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    sample, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    r, sigma_data = tl.full((), r, WIDE), tl.full((), sigma_data, WIDE)
    within = part * BLOCK + tl.arange(0, BLOCK)
    inside = within < size
    at = sample * size + within
    time = tl.load(t + sample)
    cos, sin = tl.cos(time), tl.sin(time)
    prediction = tl.load(F + at, mask=inside, other=0.0).to(WIDE)
    derivative = tl.load(dF + at, mask=inside, other=0.0).to(WIDE)
    state = tl.load(x + at, mask=inside, other=0.0)
    velocity = tl.load(dxdt + at, mask=inside, other=0.0)
    difference = -(cos * cos) * (sigma_data * prediction - velocity)
    direction = difference - r * (cos * sin * state + sigma_data * derivative)
    tl.store(g + at, direction, mask=inside)
    tl.store(sums + sample * tl.num_programs(1) + part, tl.sum(direction * direction, axis=0))


@jit
def _normalise_kernel(g, sums, norm, c, size, WIDE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    sample, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts, each = tl.num_programs(1), tl.arange(0, PARTS)
    squares = tl.load(sums + sample * parts + each, mask=each < parts, other=0.0)
    length = tl.sqrt(tl.sum(squares, axis=0))
    c = tl.full((), c, WIDE)
    if part == 0:
        tl.store(norm + sample, length)
    within = part * BLOCK + tl.arange(0, BLOCK)
    inside = within < size
    at = sample * size + within
    tl.store(g + at, tl.load(g + at, mask=inside, other=0.0) / (length + c), mask=inside)


def chunk(size: int) -> int:
    """How many of a sample's `size` elements a program takes, so that a sample has no more than some 64 programs."""
    return min(max(1024, triton.next_power_of_2(triton.cdiv(size, 64))), 8192)


@operator("tbcm::tangent")
def _tangent(
    F: Tensor, dF: Tensor, x: Tensor, dxdt: Tensor, t: Tensor, r: float, sigma_data: float, c: float
) -> tuple[Tensor, Tensor]:
    F, dF, x, dxdt, t = (tensor.contiguous() for tensor in (F, dF, x, dxdt, t))
    size = math.prod(x.shape[1:])
    block = chunk(size)
    grid, options = (x.shape[0], triton.cdiv(size, block)), {"WIDE": wide(x.dtype), "num_warps": block // 256}
    g, norm, sums = x.new_empty(x.shape), t.new_empty(t.shape), t.new_empty(grid)
    arguments = F, dF, x, dxdt, t, g, sums, r, sigma_data, size
    launch(_direction_kernel, grid, *arguments, BLOCK=block, **options)
    parts = triton.next_power_of_2(grid[1])
    launch(_normalise_kernel, grid, g, sums, norm, c, size, BLOCK=block, PARTS=parts, **options)
    return g, norm


@torch.no_grad()
def tangent(
    F: Tensor, dF: Tensor, x: Tensor, dxdt: Tensor, t: Tensor, r: float, sigma_data: float, c: float = 0.1
) -> tuple[Tensor, Tensor]:
    """The normalised tangent g [B, C, H, W] and its norm [B] before normalisation, without a graph.

    `F`, `dF`, `x`, `dxdt` [B, C, H, W], `t` [B] in radians. x, dx/dt and t are fp32, as g and norm; F and dF of
    any dtype.
    """
    exact = {x.dtype, dxdt.dtype, t.dtype} in ({torch.float32}, {torch.float64})
    unsupported = None if exact else "x, dx/dt or t other than fp32"
    if fused("tangent", F, dF, x, dxdt, t, unsupported=unsupported):
        return _tangent(F, dF, x, dxdt, t, r, sigma_data, c)
    return reference(F, dF, x, dxdt, t, r, sigma_data, c)


def cost(F: Tensor, dF: Tensor, x: Tensor, dxdt: Tensor, t: Tensor, *_: float) -> Cost:
    """11 operations an element; all is read once, and g (as large as x) and the norms are written."""
    return Cost(11 * x.numel(), nbytes(F, dF, x, dxdt, t, x, t))


def inputs(size: Size, dtype: torch.dtype, device: torch.device, tangents: bool) -> tuple[Tensor | float, ...]:
    """Of a student's samples: fp32 whatever its activations are, r in cool-down, sigma_d = 0.5."""
    exact = torch.promote_types(dtype, torch.float32)
    shape = size.samples, size.channels, size.rows, size.columns
    F, dF, x, dxdt = (torch.randn(shape, dtype=exact, device=device) for _ in range(4))
    t = torch.linspace(0.01, math.pi / 2, size.samples, dtype=exact, device=device)
    return F, dF, x, dxdt, t, 0.75, 0.5


OPERATOR = Operator("tangent", tangent, reference, inputs, cost, None, has_tangents=False)
