"""Sana-Sprint's second phase: the discriminator, what it is shown, how it learns (see `tbcm.method.sprint`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from tbcm.config.methods import Sprint
from tbcm.method.route import logit_normal_times
from tbcm.method.sprint import adversarial_times, discriminator_loss, student_loss
from tbcm.method.trigflow import renoise, rotate
from tbcm.method.types import Condition, Network, TeacherNetwork
from tbcm.models.discriminator import DiscriminatorHeads, spread_layers
from tbcm.runtime import distributed
from tbcm.runtime.optimizer import build_optimizer, clip_and_check, gated_step
from tbcm.runtime.parallel import accumulating, parallelize
from tbcm.runtime.phases import phase
from tbcm.runtime.seeding import generator, seeded
from tbcm.samples.rollouts import Batch

FIGURES = "adversarial", "discriminator_loss", "real_score", "fake_score"
"""What a step reports: the losses of student (not weighted) and discriminator, and mean scores."""


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
    seed: int, step: int, images: int, shape: Sequence[int], method: Sprint, t_max: float, device: torch.device
) -> AdversarialDraws:
    """The draws of the step's *global* batch, as those of `samples.rollouts.draw`; `shape` [C, h, w] is a latent's."""
    a, law, sigma_data = method.adversary, method.times, method.sigma_data

    def stream(name: str) -> torch.Generator:
        return generator(device, seed, step, name)

    def normal(name: str, *size: int) -> Tensor:
        return torch.randn(images, *size, generator=stream(name), device=device)

    def discriminator_times(name: str) -> Tensor:
        return logit_normal_times(normal(name), t_max, sigma_data=sigma_data, mean=a.noise_mean, std=a.noise_std)

    uniform = torch.rand(images, generator=stream("adversarial max time"), device=device)
    return AdversarialDraws(
        t=adversarial_times(
            normal("adversarial time"),
            uniform,
            t_max,
            share=a.max_time,
            sigma_data=sigma_data,
            mean=law.mean,
            std=law.std,
        ),
        z=normal("adversarial noise", *shape),
        fake_s=discriminator_times("fake time"),
        fake_noise=normal("fake noise", *shape),
        real_s=discriminator_times("real time"),
        real_noise=normal("real noise", *shape),
    )


class Adversary:
    """The discriminator of a run, its optimiser and what it has seen in the step.

    In a step: `loss` of each batch, with the student's graph; right after that one's backward pass `learn`, which shows
    the discriminator the same fakes beside real ones; at last `update`. `teacher` is frozen and runs in `autocast`; the
    global batch of a step has `images`, of which this rank's batches are `slices`.
    """

    def __init__(
        self,
        teacher: TeacherNetwork,
        autocast: Callable[[], AbstractContextManager[object]],
        method: Sprint,
        *,
        t_max: float,
        seed: int,
        images: int,
        slices: Sequence[slice],
        device: torch.device,
    ) -> None:
        self.teacher, self.autocast, self.method = teacher, autocast, method
        self.t_max, self.seed, self.images, self.slices = t_max, seed, images, slices
        a = method.adversary
        self.layers = spread_layers(len(teacher.blocks)) if a.layers is None else sorted(a.layers)
        with seeded(device, seed, "discriminator"), torch.device(device):
            self.heads = DiscriminatorHeads(teacher.width, len(self.layers))
        self.wrapped = parallelize(self.heads, (), "ddp", None, device)
        self.optimizer = build_optimizer(a.optimizer, self.heads.parameters(), lr=a.lr)
        self._shown: tuple[Batch, AdversarialDraws, list[Tensor]] | None = None

    def loss(self, student: Network, batch: Batch, step: int, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's adversarial loss on this rank's `index`-th batch of the step, its share of the global mean,
        weighted; and shares of figures."""
        sigma_data, x0, guidance = self.method.sigma_data, batch.trajectory.x0, batch.trajectory.guidance
        draws = draw_adversarial(self.seed, step, self.images, x0.shape[1:], self.method, self.t_max, x0.device)
        draws = draws[self.slices[index]]
        x = renoise(x0, sigma_data * draws.z, draws.t)
        F = student(x / sigma_data, draws.t, batch.condition, guidance).F
        fake = rotate(x, sigma_data * F.float(), draws.t)
        features = self._features(fake, draws.fake_noise, draws.fake_s, batch.condition, guidance)
        self.heads.requires_grad_(False)
        scores = self._scores(self.heads, features, x0.shape[-2:])
        self.heads.requires_grad_(True)
        self._shown = batch, draws, [x.detach() for x in features]
        loss = student_loss(scores, self.images)
        return self.method.adversary.weight * loss, {"adversarial": loss.detach()}

    def learn(self, *, last: bool) -> dict[str, Tensor]:
        """Adds the discriminator's gradient on what `loss` was last given. Returns figures, as `loss` does."""
        assert self._shown is not None
        (batch, draws, fakes), self._shown = self._shown, None
        x0, guidance = batch.trajectory.x0, batch.trajectory.guidance
        with phase("discriminator"), accumulating(self.wrapped, last=last):
            with torch.no_grad():
                reals = self._features(x0, draws.real_noise, draws.real_s, batch.condition, guidance)
            both = [torch.cat(pair) for pair in zip(reals, fakes, strict=True)]
            real, fake = self._scores(self.wrapped, both, x0.shape[-2:]).chunk(2)
            loss = discriminator_loss(real, fake, self.images)
            (loss * distributed.world_size()).backward()
        means = {"real_score": real.mean(1), "fake_score": fake.mean(1)}
        sums = {name: value.detach().sum() / self.images for name, value in means.items()}
        return {"discriminator_loss": loss.detach(), **sums}

    def update(self, finite: Tensor) -> Tensor:
        """One step of the discriminator, where `finite` says so and its own gradient, which all ranks share, is.
        Returns whether it was made, a bool scalar on the device."""
        _, own = clip_and_check(self.heads.parameters(), self.method.adversary.clip)
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

    def _features(self, x0: Tensor, noise: Tensor, s: Tensor, condition: Condition, guidance: Tensor) -> list[Tensor]:
        sigma_data = self.method.sigma_data
        x = renoise(x0, sigma_data * noise, s)
        with self.autocast():
            return self.teacher.features(x / sigma_data, s, condition, guidance, self.layers)

    def _scores(self, heads: torch.nn.Module, features: list[Tensor], latent: Sequence[int]) -> Tensor:
        with torch.autocast(features[0].device.type, enabled=False):
            return heads(features, self.teacher.grid(*latent))
