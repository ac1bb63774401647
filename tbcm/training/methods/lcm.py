"""LCM: discrete consistency distillation, on the teacher's trajectories or on noised images (see `tbcm.method.lcm`)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tbcm.config import Config
from tbcm.config.methods import Lcm as Settings
from tbcm.config.methods import Pcm
from tbcm.method.lcm import Timesteps, answers, lcm_loss
from tbcm.method.types import Network, Trajectory
from tbcm.models.loading import freeze
from tbcm.runtime.ema import EMA
from tbcm.samples.rollouts import Batch, GuidedTeacher, SampleSource
from tbcm.setup.networks import AnyNetwork, build_student
from tbcm.setup.parts import Parts
from tbcm.training.methods.method import Beside, Figures, Loss, Method
from tbcm.training.methods.sources import noised_latents, teacher_rollouts


class Lcm(Method):
    settings: Settings | Pcm

    def __init__(self, config: Config, device: torch.device, parts: Parts) -> None:
        super().__init__(config, device, parts)
        settings = self.settings
        self.timesteps = Timesteps(parts.teacher.t_max, settings.solver.shift)
        self.stride = settings.solver.skip / settings.solver.timesteps
        self.target = Target(config, parts, settings.target_decay) if settings.target_decay else None

    def make_source(self, teacher: GuidedTeacher, device: torch.device, parts: Parts) -> SampleSource:
        if self.settings.from_images:
            return noised_latents(self.config, self.settings, teacher, device, parts)
        return teacher_rollouts(self.config, self.settings, teacher, device, parts, first_point=0)

    def loss(self, student: Network, batch: Batch, part: Trajectory, step: int) -> Loss:
        return self.compared(*self.answers(student, batch, part), batch, part)

    def answers(self, student: Network, batch: Batch, part: Trajectory) -> tuple[Tensor, Tensor]:
        """The student's, with their graph, and the target's."""
        end = self.end(part.t)
        return answers(
            student,
            self.target.net if self.target else student,
            part,
            batch.condition,
            lower=self.timesteps.below(part.t, self.stride, end),
            end=end,
            sigma_data=self.settings.sigma_data,
        )

    def compared(self, got: Tensor, wanted: Tensor, batch: Batch, part: Trajectory) -> Loss:
        settings, keep = self.settings, batch.keep.repeat_interleave(part.t.shape[1])
        value, error = lcm_loss(
            got,
            wanted,
            keep,
            count=self.samples_per_step,
            sigma_data=settings.sigma_data,
            kind=settings.distance,
            huber_c=settings.huber_c,
        )
        return Loss(value, {"t": part.t.flatten(), "keep": keep, "error": error})

    def end(self, t: Tensor) -> Tensor:
        """Where the jumps from times t end: data."""
        return torch.zeros_like(t)

    def update(self, finite: Tensor) -> tuple[Tensor, Figures]:
        if self.target:
            self.target.average.update(self.target.student, finite)
        return finite, {}

    @property
    def beside(self) -> dict[str, Beside]:
        return {"target": Beside(self.target.net)} if self.target else {}

    def state(self) -> dict[str, Any]:
        return {"target": self.target.average} if self.target else {}


class Target:
    """A frozen network like the student, whose trained weights are an average of the student's: they *are* the tensors
    of `average`. After an update average <- decay average + (1 - decay) student."""

    def __init__(self, config: Config, parts: Parts, decay: float) -> None:
        self.student = parts.student
        self.average = EMA(parts.student, "halflife", halflife=-math.log(2) / math.log(decay), ramp_up=None)
        self.net: AnyNetwork = build_student(config, parts.teacher)
        for name, weight in self.net.named_parameters():
            if name in self.average.shadow:
                weight.data = self.average.shadow[name]
        freeze(self.net)
