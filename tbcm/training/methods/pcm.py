"""PCM: LCM in phases of the trajectory, alone or with its adversarial term (see `tbcm.method.pcm`)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tbcm.config import Config
from tbcm.config.methods import Pcm as Settings
from tbcm.method.pcm import phase_end, within_phase
from tbcm.method.types import Network
from tbcm.runtime.distributed import local_slices
from tbcm.samples.rollouts import Batch
from tbcm.setup.parts import Parts
from tbcm.training.methods.adversary import FIGURES, Adversary, Shown, build_adversary, draw_shown
from tbcm.training.methods.lcm import Lcm
from tbcm.training.methods.method import Beside, Figures, Loss, Term


class Pcm(Lcm):
    """Where there is an adversary, it compares in each micro-batch the student's answers with the target's, and learns
    from them right after the backward pass."""

    settings: Settings

    def __init__(self, config: Config, device: torch.device, parts: Parts) -> None:
        super().__init__(config, device, parts)
        self.slices = local_slices(config.train.prompts_per_step, config.train.prompts_at_once)
        self.adversary: Adversary | None = None
        self._last_term = 0
        if self.settings.adversary:
            self.figures = FIGURES
            self.adversary = build_adversary(config, self.settings.adversary, device, parts)

    def end(self, t: Tensor) -> Tensor:
        return phase_end(self.timesteps, self.settings.phases, t)

    def terms(self, student: Network, batch: Batch, index: int, step: int) -> list[Term]:
        if self.adversary is None:
            return super().terms(student, batch, index, step)
        parts = self.micro_batches(batch)
        self._last_term = len(parts) - 1
        return [partial(self._judged, self.adversary, student, batch, points, index, step) for points in parts]

    def _judged(
        self, adversary: Adversary, student: Network, batch: Batch, points: slice, index: int, step: int
    ) -> Loss:
        part = batch.trajectory.points(points)
        got, wanted = self.answers(student, batch, part)
        loss = self.compared(got, wanted, batch, part)
        fake = self._shown(got, "fake", part.t, points, index, step)
        real = self._shown(wanted, "real", part.t, points, index, step)
        guidance = part.guidance.repeat_interleave(part.t.shape[1])
        options: dict[str, Any] = {"count": self.samples_per_step, "keep": loss.samples["keep"]}
        value, shares = adversary.loss(fake, real, batch.condition, guidance, **options)
        return Loss(loss.value + value, loss.samples, shares)

    def _shown(self, x: Tensor, kind: str, t: Tensor, points: slice, index: int, step: int) -> Shown:
        """Answers to points of times t [P, n], noised within their phases. What is drawn depends on the place in the
        global batch and on the point alone."""
        settings, train = self.settings, self.config.train
        assert settings.adversary is not None
        shape, device = x.shape[1:], x.device
        law = settings.adversary, self.timesteps.t_max, settings.sigma_data, device
        drawn = []
        for point in range(points.start, points.stop):
            everyones = draw_shown(train.seed, step, f"{kind} of point {point}", train.prompts_per_step, shape, *law)
            drawn.append([each[self.slices[index]].clone() for each in everyones])
        s, noise = (torch.stack(some, 1).flatten(0, 1) for some in zip(*drawn, strict=True))
        s = within_phase(self.timesteps, settings.phases, t.flatten(), s)
        return Shown(x, noise, s, self.end(t).flatten())

    def after_backward(self, term: int, *, last_batch: bool) -> Figures:
        if self.adversary is None:
            return {}
        return self.adversary.learn(last=last_batch and term == self._last_term)

    def update(self, finite: Tensor) -> tuple[Tensor, Figures]:
        super().update(finite)
        return (self.adversary.update(finite) if self.adversary else finite), {}

    def give_up(self) -> None:
        if self.adversary:
            self.adversary.give_up()

    @property
    def beside(self) -> dict[str, Beside]:
        found = super().beside
        if self.adversary:
            found["discriminator"] = Beside(self.adversary.heads, self.adversary.optimizer)
        return found

    def state(self) -> dict[str, Any]:
        return super().state() | (self.adversary.state() if self.adversary else {})
