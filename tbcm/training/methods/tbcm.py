"""TBCM: samples are points of the teacher's own trajectories (paper Algorithm 1)."""

from __future__ import annotations

import torch

from tbcm.config.methods import Tbcm as Settings
from tbcm.samples.rollouts import GuidedTeacher, TeacherRollouts
from tbcm.setup.parts import Parts
from tbcm.setup.precision import switch
from tbcm.training.methods.consistency import Consistency


class Tbcm(Consistency):
    def make_source(self, teacher: GuidedTeacher, device: torch.device, parts: Parts) -> TeacherRollouts:
        settings, train = self.settings, self.config.train
        assert isinstance(settings, Settings)
        return TeacherRollouts(
            teacher,
            parts.text,
            parts.prompts,
            parts.black,
            method=settings,
            t_max=parts.teacher.t_max,
            seed=train.seed,
            prompts_per_step=train.prompts_per_step,
            prompts_per_rollout=train.prompts_per_rollout,
            cuda_graph=parts.teacher.capturable and switch(self.config.teacher.cuda_graph, device),
        )
