"""Sana-Sprint: sCM and a latent adversarial loss (Chen et al. 2025, arXiv 2503.09641)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tbcm.config import Config
from tbcm.config.methods import Sprint as Settings
from tbcm.errors import UserError
from tbcm.method.types import Network
from tbcm.models.network import DiffusersNetwork
from tbcm.runtime import distributed
from tbcm.samples.rollouts import Batch
from tbcm.setup.parts import Parts
from tbcm.setup.precision import teacher_autocast
from tbcm.training.methods.adversary import FIGURES, Adversary
from tbcm.training.methods.method import Beside, Figures, Loss, Term
from tbcm.training.methods.scm import Scm


class Sprint(Scm):
    """sCM, and before it in each batch what the discriminator says of it. Right after that term's backward pass the
    discriminator learns from what it was shown."""

    figures = FIGURES

    def __init__(self, config: Config, device: torch.device, parts: Parts) -> None:
        super().__init__(config, device, parts)
        self.adversary = build_adversary(config, device, parts)

    def terms(self, student: Network, batch: Batch, index: int, step: int) -> list[Term]:
        return [partial(self._adversarial, student, batch, index, step), *super().terms(student, batch, index, step)]

    def _adversarial(self, student: Network, batch: Batch, index: int, step: int) -> Loss:
        value, shares = self.adversary.loss(student, batch, step, index)
        return Loss(value, shares=shares)

    def after_backward(self, term: int, *, last_batch: bool) -> Figures:
        return self.adversary.learn(last=last_batch) if term == 0 else {}

    def update(self, finite: Tensor) -> Tensor:
        """A skipped update of the discriminator counts as well: a student must not follow heads that never learn."""
        return self.adversary.update(finite)

    def give_up(self) -> None:
        self.adversary.give_up()

    @property
    def beside(self) -> dict[str, Beside]:
        return {"discriminator": Beside(self.adversary.heads, self.adversary.optimizer)}

    def state(self) -> dict[str, Any]:
        return self.adversary.state()


def build_adversary(config: Config, device: torch.device, parts: Parts) -> Adversary:
    """Raises UserError for layers that the teacher does not have, or whose outputs differ in width."""
    settings, train = config.method, config.train
    assert isinstance(settings, Settings)
    if isinstance(parts.teacher, DiffusersNetwork) and parts.teacher.family.network == "unet":
        raise UserError(
            f"method.name=sprint: the blocks of {parts.teacher.family.pipeline}'s U-Net differ in width and resolution,"
            " and the discriminator takes tokens of one kind: choose method.name=scm"
        )
    blocks = len(parts.teacher.blocks)
    if settings.adversary.layers and max(settings.adversary.layers) >= blocks:
        raise UserError(
            f"method.adversary.layers = {settings.adversary.layers}: the teacher's blocks are 0 to {blocks - 1}"
        )
    parts.teacher.recompute(config.student.checkpointing)  # only the discriminator differentiates it
    return Adversary(
        parts.teacher,
        lambda: teacher_autocast(config, device),
        settings,
        t_max=parts.teacher.t_max,
        seed=train.seed,
        images=train.prompts_per_step,
        slices=distributed.local_slices(train.prompts_per_step, train.prompts_per_rollout),
        device=device,
    )
