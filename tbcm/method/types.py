"""What flows through a training step. Shapes: P prompts, N route points, B = P * n samples, prompt-major."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """What a backbone knows of its prompts: named tensors that all lead with P, and `static` values that are the same
    for all prompts (ids of tokens, shapes of images).

    A batch of B samples is prompt-major: sample b belongs to prompt b // (B / P), so that a prompt's text is held, and
    projected, once however many route points share it.
    """

    tensors: Mapping[str, Tensor]
    static: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def __getitem__(self, prompts: slice) -> Condition:
        return Condition({k: v[prompts] for k, v in self.tensors.items()}, self.static)

    def expand(self, prompts: int) -> Condition:
        """A single prompt's condition, repeated (without copying) for P prompts."""
        return Condition({k: v.expand(prompts, *v.shape[1:]) for k, v in self.tensors.items()}, self.static)

    def repeat(self, times: int) -> Condition:
        """Every prompt `times` times, as a prompt of its own, prompt-major."""
        return Condition({k: v.repeat_interleave(times, 0) for k, v in self.tensors.items()}, self.static)

    @staticmethod
    def cat(*conditions: Condition) -> Condition:
        """One after another; where their texts have different lengths, with zeros behind the shorter (a mask of zeros
        too, so that nothing sees them)."""
        names = conditions[0].tensors
        return Condition({k: _cat([c.tensors[k] for c in conditions]) for k in names}, conditions[0].static)


def _cat(tensors: list[Tensor]) -> Tensor:
    longest = max(x.shape[1] if x.dim() > 1 else 0 for x in tensors)
    return torch.cat([x if x.dim() < 2 or x.shape[1] == longest else _lengthened(x, longest) for x in tensors])


def _lengthened(x: Tensor, length: int) -> Tensor:
    """[P, L, ...] with zeros up to `length`."""
    return torch.cat([x, x.new_zeros(x.shape[0], length - x.shape[1], *x.shape[2:])], dim=1)


@dataclass(frozen=True)
class Trajectory:
    """A teacher's generation trajectories, all fp32 (paper Algorithm 1).

    x [P, N, C, H, W] states x_t; dxdt [P, N, C, H, W] their velocity dx_t/dt; t [P, N] descending times in radians;
    x0 [P, C, H, W] the end point in TrigFlow units; guidance [P].
    """

    x: Tensor
    dxdt: Tensor
    t: Tensor
    x0: Tensor
    guidance: Tensor

    def __getitem__(self, prompts: slice) -> Trajectory:
        x, dxdt, t = self.x[prompts], self.dxdt[prompts], self.t[prompts]
        return Trajectory(x, dxdt, t, self.x0[prompts], self.guidance[prompts])

    def points(self, select: slice) -> Trajectory:
        """The route points `select` of every prompt."""
        return Trajectory(self.x[:, select], self.dxdt[:, select], self.t[:, select], self.x0, self.guidance)


@dataclass(frozen=True)
class Prediction:
    """A network's answer: F [B, C, H, W] with graph, its directional derivative dF without, logvar [B] with graph."""

    F: Tensor
    dF: Tensor | None = None
    logvar: Tensor | None = None


class Network(Protocol):
    """A network in TrigFlow coordinates: teacher, student and EMA student alike.

    `u` [B, C, H, W] is x_t / sigma_data and `t` [B] the TrigFlow time, both fp32; `guidance` [B] the raw scale w, for
    networks that embed it. With `tangents` = (du [B, C, H, W], dt [B]) the prediction carries
    dF = (dF/du) du + (dF/dt) dt.
    """

    def __call__(
        self,
        u: Tensor,
        t: Tensor,
        condition: Condition,
        guidance: Tensor | None = None,
        tangents: tuple[Tensor, Tensor] | None = None,
    ) -> Prediction: ...


class TeacherNetwork(Network, Protocol):
    """A frozen network, with all that rollouts and the adversary ask of a backbone."""

    @property
    def embeds_guidance(self) -> bool:
        """Whether it takes the guidance scale in; else guidance needs both branches."""
        ...

    @property
    def blocks(self) -> Sized:
        """Modules, in order, that are sharded, checkpointed and looked into one by one."""
        ...

    @property
    def width(self) -> int:
        """Of the tokens after a block."""
        ...

    @property
    def capturable(self) -> bool:
        """Whether calls with tensors of one shape are the same work, which a CUDA graph may hold."""
        ...

    def recompute(self, checkpointing: Literal["none", "selective", "full"]) -> None:
        """What the backward pass through `features` is to recompute of a block (student.checkpointing), if it can."""
        ...

    def prepare(self, condition: Condition) -> Condition:
        """What of P prompts can be computed once, for many calls with them."""
        ...

    def guided(self, condition: Condition, null: Condition, guidance: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """(u, t) -> F under classifier-free guidance [P]; F has P rows, or 2 P: both branches, null first, for the
        caller to combine linearly."""
        ...

    def features(
        self, u: Tensor, t: Tensor, condition: Condition, guidance: Tensor | None, layers: Sequence[int]
    ) -> list[Tensor]:
        """Tokens [B, T, width] of the image after the blocks `layers`, with a graph to u."""
        ...

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens, for latents of this size."""
        ...
