"""A discriminator beside a method: what it is shown, how it learns (see `tbcm.method.sprint`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tbcm.config import Config
from tbcm.config.methods import Judge
from tbcm.errors import UserError
from tbcm.method.pcm import renoise_on
from tbcm.method.route import logit_normal_times
from tbcm.method.sprint import discriminator_loss, mean_score, student_loss
from tbcm.method.trigflow import renoise
from tbcm.method.types import Condition, TeacherNetwork
from tbcm.models.discriminator import DiscriminatorHeads, spread_layers
from tbcm.models.network import DiffusersNetwork
from tbcm.runtime import distributed
from tbcm.runtime.optimizer import build_optimizer, clip_and_check, gated_step
from tbcm.runtime.parallel import accumulating, parallelize
from tbcm.runtime.phases import phase
from tbcm.runtime.seeding import generator, seeded
from tbcm.setup.parts import Parts
from tbcm.setup.precision import teacher_autocast

FIGURES = "adversarial", "discriminator_loss", "real_score", "fake_score"
"""What a step reports: the losses of student (not weighted) and discriminator, and mean scores."""


@dataclass(frozen=True)
class Shown:
    """States that are noised and then judged: x [B, C, H, W] at times `start` [B] (None: data), standard-normal noise
    like x, and the times s [B] up to which it is added."""

    x: Tensor
    noise: Tensor
    s: Tensor
    start: Tensor | None = None

    def noised(self, sigma_data: float) -> Tensor:
        noise = sigma_data * self.noise
        if self.start is None:
            return renoise(self.x, noise, self.s)
        return renoise_on(self.x, noise, self.start, self.s)


def draw_shown(
    seed: int,
    step: int,
    kind: str,
    images: int,
    shape: Sequence[int],
    law: Judge,
    t_max: float,
    sigma_data: float,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Times and noise, fp32 [images] and [images, C, h, w], for the step's *global* batch of one `kind` ("fake",
    "real"), as the draws of `samples.rollouts.draw`; `shape` [C, h, w] is a latent's."""

    def normal(name: str, *size: int) -> Tensor:
        return torch.randn(images, *size, generator=generator(device, seed, step, f"{kind} {name}"), device=device)

    s = logit_normal_times(normal("time"), t_max, sigma_data=sigma_data, mean=law.noise_mean, std=law.noise_std)
    return s, normal("noise", *shape)


class Adversary:
    """The discriminator of a run, its optimiser and what it has seen in the step.

    In a step: `loss` of each batch, with the student's graph; right after that one's backward pass `learn`, which shows
    the discriminator the same fakes beside real ones; at last `update`. `teacher` is frozen and runs in `autocast`.
    """

    def __init__(
        self,
        teacher: TeacherNetwork,
        autocast: Callable[[], AbstractContextManager[object]],
        settings: Judge,
        *,
        sigma_data: float,
        seed: int,
        device: torch.device,
    ) -> None:
        self.teacher, self.autocast, self.settings, self.sigma_data = teacher, autocast, settings, sigma_data
        self.layers = spread_layers(len(teacher.blocks)) if settings.layers is None else sorted(settings.layers)
        with seeded(device, seed, "discriminator"), torch.device(device):
            self.heads = DiscriminatorHeads(teacher.width, len(self.layers))
        self.wrapped = parallelize(self.heads, (), "ddp", None, device)
        self.optimizer = build_optimizer(settings.optimizer, self.heads.parameters(), lr=settings.lr)
        self._shown: tuple[Shown, list[Tensor], Callable[[Shown], list[Tensor]], int, Tensor | None] | None = None

    def loss(
        self,
        fake: Shown,
        real: Shown,
        condition: Condition,
        guidance: Tensor,
        *,
        count: int,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's adversarial loss for its fakes, which carry its graph: this rank's share of the global mean,
        weighted; and shares of figures. `guidance` and `keep` are [B]; the step has `count` samples."""

        def features(shown: Shown) -> list[Tensor]:
            return self._features(shown, condition, guidance)

        size, seen = fake.x.shape[-2:], features(fake)
        self.heads.requires_grad_(False)
        scores = self._scores(self.heads, seen, size)
        self.heads.requires_grad_(True)
        self._shown = real, [x.detach() for x in seen], features, count, keep
        loss = student_loss(scores, count, keep)
        return self.settings.weight * loss, {"adversarial": loss.detach()}

    def learn(self, *, last: bool) -> dict[str, Tensor]:
        """Adds the discriminator's gradient on what `loss` was last given. Returns figures, as `loss` does."""
        assert self._shown is not None
        (shown, fakes, features, count, keep), self._shown = self._shown, None
        with phase("discriminator"), accumulating(self.wrapped, last=last):
            with torch.no_grad():
                reals = features(shown)
            both = [torch.cat(pair) for pair in zip(reals, fakes, strict=True)]
            real, fake = self._scores(self.wrapped, both, shown.x.shape[-2:]).chunk(2)
            loss = discriminator_loss(real, fake, count, keep)
            (loss * distributed.world_size()).backward()
        scores = {"real_score": real.detach(), "fake_score": fake.detach()}
        sums = {name: mean_score(value, count, keep) for name, value in scores.items()}
        return {"discriminator_loss": loss.detach(), **sums}

    def update(self, finite: Tensor) -> Tensor:
        """One step of the discriminator, where `finite` says so and its own gradient, which all ranks share, is.
        Returns whether it was made, a bool scalar on the device."""
        _, own = clip_and_check(self.heads.parameters(), self.settings.clip)
        made = finite & own
        gated_step(self.optimizer, made)
        self.optimizer.zero_grad(set_to_none=True)
        self.heads.renew()
        return made

    def state(self) -> dict[str, Any]:
        return {"discriminator": self.heads, "discriminator_optimizer": self.optimizer}

    def give_up(self) -> None:
        """Forgets the step so far."""
        self._shown = None
        self.optimizer.zero_grad(set_to_none=True)

    def _features(self, shown: Shown, condition: Condition, guidance: Tensor) -> list[Tensor]:
        x = shown.noised(self.sigma_data)
        with self.autocast():
            return self.teacher.features(x / self.sigma_data, shown.s, condition, guidance, self.layers)

    def _scores(self, heads: torch.nn.Module, features: list[Tensor], latent: Sequence[int]) -> Tensor:
        with torch.autocast(features[0].device.type, enabled=False):
            return heads(features, self.teacher.grid(*latent))


def build_adversary(config: Config, settings: Judge, device: torch.device, parts: Parts) -> Adversary:
    """Raises UserError for layers that the teacher does not have, or whose outputs differ in width."""
    if isinstance(parts.teacher, DiffusersNetwork) and parts.teacher.family.network == "unet":
        name = config.method.name
        instead = "choose method.name=scm" if name == "sprint" else "set method.adversary=null"
        raise UserError(
            f"method.name={name}: the blocks of {parts.teacher.family.pipeline}'s U-Net differ in width and resolution,"
            f" and the discriminator takes tokens of one kind: {instead}"
        )
    blocks = len(parts.teacher.blocks)
    if settings.layers and max(settings.layers) >= blocks:
        raise UserError(f"method.adversary.layers = {settings.layers}: the teacher's blocks are 0 to {blocks - 1}")
    parts.teacher.recompute(config.student.checkpointing)  # only the discriminator differentiates it
    return Adversary(
        parts.teacher,
        lambda: teacher_autocast(config, device),
        settings,
        sigma_data=config.method.sigma_data,
        seed=config.train.seed,
        device=device,
    )
