"""TBCM: samples are points of the teacher's own trajectories (paper Algorithm 1)."""

from __future__ import annotations

import torch

from tbcm.config.methods import Tbcm as Settings
from tbcm.method.tbcm import first_training_point
from tbcm.samples.rollouts import GuidedTeacher, TeacherRollouts
from tbcm.setup.parts import Parts
from tbcm.training.methods.consistency import Consistency
from tbcm.training.methods.sources import teacher_rollouts


class Tbcm(Consistency):
    def make_source(self, teacher: GuidedTeacher, device: torch.device, parts: Parts) -> TeacherRollouts:
        assert isinstance(self.settings, Settings)
        first = first_training_point(parts.teacher.t_max)
        return teacher_rollouts(self.config, self.settings, teacher, device, parts, first_point=first)
