"""A step of a teacher's rollout: guidance, velocity, the trajectory's next point, and where both are kept.

    F = F_u + w (F_c - F_u),    dx/dt = sigma_d F,    x' = cos(delta) x - sin(delta) dx/dt

x and dx/dt become point i of the prompt-major trajectory, which the training batch is a view of. One kernel; everything
is read once and written once. It is told where point i lies, not i, and so is the same kernel at every step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tbcm_kernels.catalog import Cost, Operator, Size, nbytes
from tbcm_kernels.dispatch import fused
from tbcm_kernels.launch import jit, launch, operator, tl, triton, wide

BLOCK = 1024
"""Elements a program takes: few, as a rollout has few prompts and the card many processors."""


def combined(F: Tensor, guidance: Tensor) -> Tensor:
    """Classifier-free guidance, F_uncond + w (F_cond - F_uncond), w = `guidance` [P] and in its dtype, of F [2 P, ...];
    F [P, ...] of a single branch as it is."""
    F = F.to(guidance.dtype)
    if F.shape[0] == guidance.shape[0]:
        return F
    uncond, cond = F.chunk(2)
    return uncond + guidance[:, None, None, None] * (cond - uncond)


def reference(
    F: Tensor, x: Tensor, guidance: Tensor, delta: Tensor, xs: Tensor, dxdts: Tensor, i: int, sigma_data: float
) -> Tensor:
    """`trigflow_step` in plain PyTorch."""
    dxdt = sigma_data * combined(F, guidance)
    xs[:, i], dxdts[:, i] = x, dxdt
    delta = delta[:, None, None, None]
    return torch.cos(delta) * x - torch.sin(delta) * dxdt


@jit
def _step_kernel(
    F, x, guidance, delta, point, velocity, following, sigma_data, half, size, stride, delta_stride,
    GUIDED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    prompt = tl.program_id(0).to(tl.int64)
    within = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = within < size
    at, kept = prompt * size + within, prompt * stride + within
    angle = tl.load(delta + prompt * delta_stride).to(WIDE)
    state = tl.load(x + at, mask=inside, other=0.0).to(WIDE)
    prediction = tl.load(F + at, mask=inside, other=0.0).to(WIDE)
    if GUIDED:
        conditional = tl.load(F + half + at, mask=inside, other=0.0).to(WIDE)
        prediction += tl.load(guidance + prompt).to(WIDE) * (conditional - prediction)
    dxdt = tl.full((), sigma_data, WIDE) * prediction
    tl.store(point + kept, state, mask=inside)
    tl.store(velocity + kept, dxdt, mask=inside)
    tl.store(following + at, tl.cos(angle) * state - tl.sin(angle) * dxdt, mask=inside)


@operator("tbcm::trigflow_step", mutates_args=("xs", "dxdts"))
def _trigflow_step(
    F: Tensor, x: Tensor, guidance: Tensor, delta: Tensor, xs: Tensor, dxdts: Tensor, i: int, sigma_data: float
) -> Tensor:
    F, x, guidance = F.contiguous(), x.contiguous(), guidance.contiguous()
    following, size = x.new_empty(x.shape), math.prod(x.shape[1:])
    tensors = F, x, guidance, delta, xs[:, i], dxdts[:, i], following
    numbers = sigma_data, F.numel() // 2, size, xs.stride(0), delta.stride(0)
    grid, guided = (x.shape[0], triton.cdiv(size, BLOCK)), F.shape[0] != x.shape[0]
    launch(_step_kernel, grid, *tensors, *numbers, GUIDED=guided, WIDE=wide(x.dtype), BLOCK=BLOCK, num_warps=4)
    return following


@torch.no_grad()
def trigflow_step(
    F: Tensor, x: Tensor, guidance: Tensor, delta: Tensor, xs: Tensor, dxdts: Tensor, i: int, sigma_data: float
) -> Tensor:
    """The state [P, C, H, W] that follows `x` [P, C, H, W], without a graph; writes x and dx/dt to point `i` of `xs`
    and `dxdts` [P, N, C, H, W].

    `F` is a network's answer at x / sigma_d: [2 P, C, H, W], the unconditional half first, to be combined with
    `guidance` w [P]; or [P, C, H, W], as it is. `delta` [P] is t_i - t_{i+1}. All fp32; F may be of half precision, and
    is cast first. Raises ValueError where F has neither shape.
    """
    if F.shape[1:] != x.shape[1:] or F.shape[0] not in (x.shape[0], 2 * x.shape[0]):
        raise ValueError(f"F is {list(F.shape)} and x {list(x.shape)}: F has a row for each of x, or two")
    unsupported = None if xs.is_contiguous() and dxdts.is_contiguous() else "a trajectory that is not contiguous"
    if fused("trigflow_step", F, x, guidance, delta, xs, dxdts, unsupported=unsupported):
        return _trigflow_step(F, x, guidance, delta, xs, dxdts, i, sigma_data)
    return reference(F, x, guidance, delta, xs, dxdts, i, sigma_data)


def cost(
    F: Tensor, x: Tensor, guidance: Tensor, delta: Tensor, xs: Tensor, dxdts: Tensor, i: int, sigma_data: float
) -> Cost:
    """4 operations an element, 7 with guidance; F and x are read, x, dx/dt and the next x are written."""
    guided = F.shape[0] != x.shape[0]
    written = x.numel() * (xs.element_size() + dxdts.element_size() + x.element_size())
    return Cost((7 if guided else 4) * x.numel(), nbytes(F, x, guidance if guided else None, delta) + written)


def inputs(size: Size, dtype: torch.dtype, device: torch.device, tangents: bool) -> tuple[Tensor | float, ...]:
    """Of a guided teacher, whose answer is fp32 whatever its activations are; the first step, sigma_d = 0.5."""
    exact = torch.promote_types(dtype, torch.float32)
    latent = size.channels, size.rows, size.columns
    F = torch.randn(2 * size.prompts, *latent, dtype=exact, device=device)
    x, guidance, delta = F[: size.prompts] * 0.5, *(torch.rand(2, size.prompts, dtype=exact, device=device))
    xs = torch.zeros(size.prompts, size.points, *latent, dtype=exact, device=device)
    return F, x, 4 + guidance, delta, xs, torch.zeros_like(xs), 0, 0.5


OPERATOR = Operator("trigflow_step", trigflow_step, reference, inputs, cost, None, has_tangents=False)
