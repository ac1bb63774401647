"""Where samples come from, as the configuration has it: points of the teacher's trajectories, or noised images."""

from __future__ import annotations

import torch

from tbcm.config import Config
from tbcm.config.methods import Noised, Rolled
from tbcm.samples.noised import NoisedLatents
from tbcm.samples.rollouts import GuidedTeacher, TeacherRollouts
from tbcm.setup.parts import Parts
from tbcm.setup.precision import switch


def teacher_rollouts(
    config: Config, settings: Rolled, teacher: GuidedTeacher, device: torch.device, parts: Parts, *, first_point: int
) -> TeacherRollouts:
    """Of each trajectory the first `first_point` points are not trained on."""
    train = config.train
    return TeacherRollouts(
        teacher,
        parts.text,
        parts.prompts,
        parts.black,
        method=settings,
        t_max=parts.teacher.t_max,
        first_point=first_point,
        seed=train.seed,
        prompts_per_step=train.prompts_per_step,
        prompts_per_rollout=train.prompts_per_rollout,
        prompts_at_once=train.prompts_at_once,
        cuda_graph=parts.teacher.capturable and switch(config.teacher.cuda_graph, device),
    )


def noised_latents(
    config: Config, settings: Noised, teacher: GuidedTeacher, device: torch.device, parts: Parts
) -> NoisedLatents:
    train = config.train
    assert parts.latents is not None
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
        prompts_at_once=train.prompts_at_once,
    )
