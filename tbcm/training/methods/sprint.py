"""Sana-Sprint: sCM and a latent adversarial loss (Chen et al. 2025, arXiv 2503.09641)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tbcm.config import Config
from tbcm.config.methods import Sprint as Settings
from tbcm.method.sprint import adversarial_times
from tbcm.method.trigflow import renoise, rotate
from tbcm.method.types import Network
from tbcm.runtime.distributed import local_slices
from tbcm.runtime.seeding import generator
from tbcm.samples.rollouts import Batch
from tbcm.setup.parts import Parts
from tbcm.training.methods.adversary import FIGURES, Shown, build_adversary, draw_shown
from tbcm.training.methods.method import Beside, Figures, Loss, Term
from tbcm.training.methods.scm import Scm


@dataclass(frozen=True)
class AdversarialDraws:
    """All randomness of P images in one step, fp32 [P, ...]: times t and noise z of what the student is given, times s
    and noises of the fakes and of the real ones that the discriminator is given. Noises are standard normal."""

    t: Tensor
    z: Tensor
    fake_s: Tensor
    fake_noise: Tensor
    real_s: Tensor
    real_noise: Tensor

    def __getitem__(self, images: slice) -> AdversarialDraws:
        """Copies, so that the rest is not kept: in a large global batch these are many times a rank's."""
        return AdversarialDraws(*(getattr(self, field.name)[images].clone() for field in fields(self)))


def draw_adversarial(
    seed: int, step: int, images: int, shape: Sequence[int], method: Settings, t_max: float, device: torch.device
) -> AdversarialDraws:
    """The draws of the step's *global* batch, as those of `samples.rollouts.draw`; `shape` [C, h, w] is a latent's."""
    a, law, sigma_data = method.adversary, method.times, method.sigma_data

    def stream(name: str) -> torch.Generator:
        return generator(device, seed, step, name)

    def shown(kind: str) -> tuple[Tensor, Tensor]:
        return draw_shown(seed, step, kind, images, shape, a, t_max, sigma_data, device)

    normal = torch.randn(images, generator=stream("adversarial time"), device=device)
    uniform = torch.rand(images, generator=stream("adversarial max time"), device=device)
    t = adversarial_times(normal, uniform, t_max, share=a.max_time, sigma_data=sigma_data, mean=law.mean, std=law.std)
    z = torch.randn(images, *shape, generator=stream("adversarial noise"), device=device)
    return AdversarialDraws(t, z, *shown("fake"), *shown("real"))


class Sprint(Scm):
    """sCM, and before it in each batch what the discriminator says of it. Right after that term's backward pass the
    discriminator learns from what it was shown."""

    figures = FIGURES
    settings: Settings

    def __init__(self, config: Config, device: torch.device, parts: Parts) -> None:
        super().__init__(config, device, parts)
        self.device, self.t_max = device, parts.teacher.t_max
        self.slices = local_slices(config.train.prompts_per_step, config.train.prompts_at_once)
        self.adversary = build_adversary(config, self.settings.adversary, device, parts)

    def terms(self, student: Network, batch: Batch, index: int, step: int) -> list[Term]:
        return [partial(self.adversarial, student, batch, index, step), *super().terms(student, batch, index, step)]

    def adversarial(self, student: Network, batch: Batch, index: int, step: int) -> Loss:
        """Of what the student makes of this rank's `index`-th batch of images, noised to times of its own."""
        sigma_data, x0, guidance = self.settings.sigma_data, batch.trajectory.x0, batch.trajectory.guidance
        images, seed = self.samples_per_step, self.config.train.seed
        draws = draw_adversarial(seed, step, images, x0.shape[1:], self.settings, self.t_max, x0.device)
        draws = draws[self.slices[index]]
        x = renoise(x0, sigma_data * draws.z, draws.t)
        F = student(x / sigma_data, draws.t, batch.condition, guidance).F
        fake = Shown(rotate(x, sigma_data * F.float(), draws.t), draws.fake_noise, draws.fake_s)
        real = Shown(x0, draws.real_noise, draws.real_s)
        value, shares = self.adversary.loss(fake, real, batch.condition, guidance, count=images)
        return Loss(value, shares=shares)

    def after_backward(self, term: int, *, last_batch: bool) -> Figures:
        return self.adversary.learn(last=last_batch) if term == 0 else {}

    def update(self, finite: Tensor) -> tuple[Tensor, Figures]:
        """A skipped update of the discriminator counts as well: a student must not follow heads that never learn."""
        return self.adversary.update(finite), {}

    def give_up(self) -> None:
        self.adversary.give_up()

    @property
    def beside(self) -> dict[str, Beside]:
        return {"discriminator": Beside(self.adversary.heads, self.adversary.optimizer)}

    def state(self) -> dict[str, Any]:
        return self.adversary.state()
