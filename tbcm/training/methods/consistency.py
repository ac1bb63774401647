"""What TBCM, sCM and Sana-Sprint share: the continuous-time consistency loss."""

from __future__ import annotations

import torch

from tbcm.config import Config
from tbcm.config.methods import Scm, Sprint, Tbcm
from tbcm.method.consistency import RSchedule
from tbcm.method.tbcm import tbcm_loss
from tbcm.method.types import Network, Trajectory
from tbcm.samples.rollouts import Batch
from tbcm.setup.parts import Parts
from tbcm.training.methods.method import Loss, Method


class Consistency(Method):
    settings: Tbcm | Scm | Sprint
    sample_figures = ("error", "g_norm", "logvar")

    def __init__(self, config: Config, device: torch.device, parts: Parts) -> None:
        super().__init__(config, device, parts)
        r = self.settings.r
        self.r = RSchedule(r.warmup_steps, r.final, r.cooldown_start, r.cooldown_steps)

    def loss(self, student: Network, batch: Batch, part: Trajectory, step: int) -> Loss:
        value, samples = tbcm_loss(
            student,
            part,
            batch.condition,
            batch.keep,
            count=self.samples_per_step,
            r=self.r(step),
            sigma_data=self.settings.sigma_data,
            c=self.settings.tangent_c,
        )
        return Loss(value, samples)

    def scheduled(self, step: int) -> dict[str, float]:
        return {"r": self.r(step)}
