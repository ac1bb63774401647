"""What is known of every operator besides its code: what it costs, and its arguments in a real network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Dual = tuple[Tensor, Tensor | None]
"""A value and its tangent (None: the tangent is not wanted). The tangent has the value's shape, and no graph."""


class Cost(NamedTuple):
    """Of one call: floating-point operations, a multiply-add counting as two, and bytes of device memory, each tensor
    that must be read or written counted once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Size:
    """How large tensors are: P prompts of n points, B = P n samples of T = rows x columns tokens of width D;
    `hidden` is C of a Mix-FFN's gated halves, 2 C wide together; latents have `channels`."""

    prompts: int
    points: int
    rows: int
    columns: int
    dim: int
    heads: int
    cross_heads: int
    hidden: int
    text: int = 300
    channels: int = 32

    @property
    def samples(self) -> int:
        return self.prompts * self.points

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


_MODELS = {
    "sana-600m": (32, 1152, 36, 16, 300),
    "sana-1600m": (32, 2240, 70, 20, 300),
    "sd3": (16, 1536, 24, 24, 333),
    "flux": (16, 3072, 24, 24, 512),
}
"""Pixels along a token's side, width, heads of attention to the image and to text, tokens of text."""
SANA, JOINT = ("sana-600m", "sana-1600m"), ("sd3", "flux")
"""Sana, whose attention to the image is linear; Stable Diffusion 3 (medium) and FLUX, with heads of 64 and 128."""


def size_of(model: str, prompts: int = 1, points: int = 15, pixels: int = 1024) -> Size:
    """Sizes in one of SANA or JOINT, of images of `pixels` squared."""
    side, dim, heads, cross_heads, text = _MODELS[model]
    tokens = pixels // side
    return Size(prompts, points, tokens, tokens, dim, heads, cross_heads, hidden=dim * 5 // 2, text=text)


@dataclass(frozen=True)
class Operator:
    """An operator of this package, as benches, tests and ahead-of-time compilation see it.

    `run(*arguments)` dispatches, `reference(*arguments)` is plain PyTorch; `inputs(size, dtype, device, tangents)` are
    random arguments (leaves require gradients where training asks for them), `cost(*arguments)` and
    `backward_cost(*arguments)` count what they must do at least (backward: None where there is none). `models` have it.
    """

    name: str
    run: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[[Size, torch.dtype, torch.device, bool], tuple[Any, ...]]
    cost: Callable[..., Cost]
    backward_cost: Callable[..., Cost] | None
    has_tangents: bool = True
    models: tuple[str, ...] = SANA


def nbytes(*tensors: Tensor | None) -> int:
    """Of all that are given."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
