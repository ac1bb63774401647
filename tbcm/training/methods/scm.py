"""sCM: samples are noised images at one time each (Lu & Song 2024, arXiv 2410.11081)."""

from __future__ import annotations

import torch

from tbcm.config.methods import Noised
from tbcm.samples.noised import NoisedLatents
from tbcm.samples.rollouts import GuidedTeacher
from tbcm.setup.parts import Parts
from tbcm.training.methods.consistency import Consistency
from tbcm.training.methods.sources import noised_latents


class Scm(Consistency):
    def make_source(self, teacher: GuidedTeacher, device: torch.device, parts: Parts) -> NoisedLatents:
        assert isinstance(self.settings, Noised)
        return noised_latents(self.config, self.settings, teacher, device, parts)
