"""What the trainer asks of a method, whatever it does: samples, a loss in terms, and updates beside the student's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tbcm.config import Config
from tbcm.method.types import Network, Trajectory
from tbcm.samples.overlap import Overlapped
from tbcm.samples.rollouts import Batch, GuidedTeacher, SampleSource
from tbcm.setup.parts import Parts
from tbcm.setup.precision import teacher_autocast

Figures = Mapping[str, Tensor]


@dataclass(frozen=True)
class Loss:
    """This rank's share of a step's loss, a scalar with its graph, and figures for the log: of single samples
    (`StepStatistics.add`), and shares of whole steps' (`StepStatistics.add_shares`)."""

    value: Tensor
    samples: Figures = field(default_factory=dict)
    shares: Figures = field(default_factory=dict)


Term = Callable[[], Loss]
"""A part of a batch's loss, computed when it is called."""


@dataclass(frozen=True)
class Beside:
    """A network that a method holds beside teacher and student, and what trains it (None: it is frozen)."""

    net: nn.Module
    optimizer: torch.optim.Optimizer | None = None


class Method(ABC):
    """A method. The trainer calls, in each step: `terms` of each batch of `source`, and after the backward pass of each
    term `after_backward`; then `update`, or `give_up` where the step is broken off."""

    sample_figures: tuple[str, ...] = ("error",)
    """Names of the single samples' figures that its terms report, beside `t` and `keep`."""

    figures: tuple[str, ...] = ()
    """Names of the whole steps' figures that its terms report."""

    def __init__(self, config: Config, device: torch.device, parts: Parts) -> None:
        self.config, self.settings = config, config.method
        self.teacher = GuidedTeacher(
            parts.teacher, parts.text, lambda: teacher_autocast(config, device), config.resolution
        )
        source = self.make_source(self.teacher, device, parts)
        self.source = Overlapped(source, device) if config.train.overlap_rollout else source

    @abstractmethod
    def make_source(self, teacher: GuidedTeacher, device: torch.device, parts: Parts) -> SampleSource:
        """Where the samples of a step come from."""

    def loss(self, student: Network, batch: Batch, part: Trajectory, step: int) -> Loss:
        """Of some of a batch's points, its `part`: of methods that make no terms of their own."""
        raise NotImplementedError

    @property
    def samples_per_step(self) -> int:
        """Samples optimised in a step, over all ranks."""
        return self.config.train.prompts_per_step * self.source.samples_per_prompt

    def terms(self, student: Network, batch: Batch, index: int, step: int) -> list[Term]:
        """The loss of this rank's `index`-th batch of the step, in terms of which one at a time is in memory: a
        micro-batch of points each. The last one is to reach every weight, since it exchanges the gradients."""
        parts = (batch.trajectory.points(points) for points in self.micro_batches(batch))
        return [partial(self.loss, student, batch, part, step) for part in parts]

    def micro_batches(self, batch: Batch) -> list[slice]:
        """Which points of a batch's trajectory are trained on at once."""
        first, end = self.source.first_point, batch.trajectory.t.shape[1]
        size = self.config.train.points_per_micro_batch or end
        return [slice(start, min(start + size, end)) for start in range(first, end, size)]

    def after_backward(self, term: int, *, last_batch: bool) -> Figures:
        """After the student's backward pass of the `term`-th term of a batch. Returns shares of figures."""
        return {}

    def update(self, finite: Tensor) -> tuple[Tensor, Figures]:
        """After the student's update, which was made where `finite`. Returns where all updates were made, and shares of
        figures."""
        return finite, {}

    def give_up(self) -> None:
        """Forgets the step so far."""
        return None

    def scheduled(self, step: int) -> dict[str, float]:
        """What of its settings depends on the step, for the log."""
        return {}

    @property
    def beside(self) -> Mapping[str, Beside]:
        """What it holds beside teacher and student, by name."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the method."""
        return {}
