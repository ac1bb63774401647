"""sCM: samples are noised images at one time each (Lu & Song 2024, arXiv 2410.11081)."""

from __future__ import annotations

import torch

from tbcm.config.methods import Tbcm as TbcmSettings
from tbcm.samples.noised import NoisedLatents
from tbcm.samples.rollouts import GuidedTeacher
from tbcm.setup.parts import Parts
from tbcm.training.methods.consistency import Consistency


class Scm(Consistency):
    def make_source(self, teacher: GuidedTeacher, device: torch.device, parts: Parts) -> NoisedLatents:
        settings, train = self.settings, self.config.train
        assert parts.latents is not None and not isinstance(settings, TbcmSettings)
        return NoisedLatents(
            teacher,
            parts.text,
            parts.latents,
            shapes={size: black.shape for size, black in parts.black.items()},
            device=device,
            method=settings,
            t_max=parts.teacher.t_max,
            seed=train.seed,
            prompts_per_step=train.prompts_per_step,
            prompts_per_rollout=train.prompts_per_rollout,
        )
