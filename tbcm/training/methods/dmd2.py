"""DMD2: the student's samples are moved to where the teacher finds them likelier (see `tbcm.method.dmd2`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from tbcm_kernels.trigflow_step import combined
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from tbcm.config import Config
from tbcm.config.methods import Dmd2 as Settings
from tbcm.method.dmd2 import matching_gradient, matching_loss, simulated, velocity_loss
from tbcm.method.lcm import Timesteps
from tbcm.method.rollout import embedded
from tbcm.method.sampling import student_times
from tbcm.method.trigflow import renoise, rotate
from tbcm.method.types import Network
from tbcm.runtime.distributed import local_slices
from tbcm.runtime.parallel import forget_gathered
from tbcm.runtime.phases import phase
from tbcm.runtime.seeding import generator, stream_bytes
from tbcm.runtime.signs import pulse
from tbcm.samples.rollouts import Batch, GuidedTeacher
from tbcm.samples.starts import Starts
from tbcm.setup.parts import Parts
from tbcm.training.methods.adversary import FIGURES, Adversary, Shown, build_adversary, draw_shown
from tbcm.training.methods.fake import Fake
from tbcm.training.methods.method import Beside, Figures, Loss, Method, Term


class Dmd2(Method):
    """In a step: one update of the student, from a term a batch; then several of the fake network, each on new samples
    of the same prompts."""

    settings: Settings

    def __init__(self, config: Config, device: torch.device, parts: Parts) -> None:
        super().__init__(config, device, parts)
        settings, train = self.settings, config.train
        self.figures = ("fake_loss", *FIGURES) if settings.adversary else ("fake_loss",)
        self.timesteps = Timesteps(parts.teacher.t_max, settings.noise.shift)
        with _disable_current_modes():  # numbers, in a step that is only traced too
            self.times = student_times(settings.steps, parts.teacher.t_max)
        self.slices = local_slices(train.prompts_per_step, train.prompts_at_once)
        self.size_of = {tuple(black.shape): size for size, black in parts.black.items()}
        self.fake = Fake(config, settings.fake, device, parts)
        self.adversary: Adversary | None = None
        if settings.adversary:
            self.adversary = build_adversary(config, settings.adversary, device, parts)
        self._seen: list[tuple[Network, Batch, int, int]] = []  # of the step so far

    def make_source(self, teacher: GuidedTeacher, device: torch.device, parts: Parts) -> Starts:
        settings, train = self.settings, self.config.train
        return Starts(
            parts.text,
            parts.prompts,
            parts.latents,
            shapes={size: black.shape for size, black in parts.black.items()},
            guidance=settings.guidance,
            sigma_data=settings.sigma_data,
            t_max=parts.teacher.t_max,
            seed=train.seed,
            prompts_per_step=train.prompts_per_step,
            prompts_at_once=train.prompts_at_once,
            device=device,
        )

    def terms(self, student: Network, batch: Batch, index: int, step: int) -> list[Term]:
        if index == 0:
            self._seen.clear()
        self._seen.append((student, batch, index, step))
        return [partial(self._matched, student, batch, index, step)]

    def _matched(self, student: Network, batch: Batch, index: int, step: int) -> Loss:
        sigma_data, guidance, count = self.settings.sigma_data, batch.trajectory.guidance, self.samples_per_step
        x = self._sample(student, batch, index, step, "", batch.trajectory.x[:, 0])
        s, z = self._noise("matched", x, index, step, self.settings.noise.low, self.settings.noise.high)
        with torch.no_grad():
            noised = renoise(x, z, s)
            u = noised / sigma_data
            F_fake = self.fake.velocity(u, s, batch.condition, guidance)
            fake = rotate(noised, sigma_data * F_fake.float(), s)
            with phase("teacher"):
                prepared = self.teacher.prepare(batch.condition)
                velocity = self.teacher.velocity(prepared, guidance, self.size_of[tuple(x.shape[1:])])
                real = rotate(noised, sigma_data * combined(velocity(u, s), guidance), s)
            error = ((fake - real) / sigma_data).square().flatten(1).mean(1)
        value = matching_loss(x, matching_gradient(x.detach(), real, fake), sigma_data, count)
        samples = {"t": s, "keep": batch.keep, "error": error}
        if self.adversary is None:
            return Loss(value, samples)
        states = {"fake": x, "real": batch.trajectory.x0}
        fakes, reals = (self._shown(self.adversary, state, kind, index, step) for kind, state in states.items())
        judged, shares = self.adversary.loss(fakes, reals, batch.condition, guidance, count=count)
        return Loss(value + judged, samples, shares)

    def _shown(self, adversary: Adversary, x: Tensor, kind: str, index: int, step: int) -> Shown:
        train, law = self.config.train, (adversary.settings, self.timesteps.t_max, self.settings.sigma_data, x.device)
        s, noise = draw_shown(train.seed, step, kind, train.prompts_per_step, x.shape[1:], *law)
        return Shown(x, noise[self.slices[index]].clone(), s[self.slices[index]])

    def _sample(self, student: Network, batch: Batch, index: int, step: int, name: str, start: Tensor) -> Tensor:
        """The student's sample, at one of its times that is drawn for the whole step."""
        seed = self.config.train.seed
        stage = int.from_bytes(stream_bytes(seed, step, f"stage{name}", 8), "little") % len(self.times)
        fresh = [self._normal(f"simulated {i}{name}", start, index, step) for i in range(stage)]
        velocity = embedded(student, batch.condition, batch.trajectory.guidance)
        return simulated(velocity, start, self.times, stage, self.settings.sigma_data, fresh)

    def _normal(self, name: str, like: Tensor, index: int, step: int) -> Tensor:
        """This rank's part of the global batch's noise ~ N(0, sigma_d^2)."""
        train, shape = self.config.train, like.shape[1:]
        source = generator(like.device, train.seed, step, name)
        drawn = torch.randn(train.prompts_per_step, *shape, generator=source, device=like.device)
        return self.settings.sigma_data * drawn[self.slices[index]]

    def _noise(self, name: str, like: Tensor, index: int, step: int, low: float, high: float) -> tuple[Tensor, Tensor]:
        """Times whose places among the timesteps are even in (low, high], and noise, of this rank's part."""
        train = self.config.train
        source = generator(like.device, train.seed, step, f"{name} time")
        even = torch.rand(train.prompts_per_step, generator=source, device=like.device)[self.slices[index]]
        s = self.timesteps.time(low + (high - low) * (1 - even.double()))
        return s, self._normal(f"{name} noise", like, index, step)

    def _followed(self, student: Network, batch: Batch, index: int, step: int, name: str) -> Tensor:
        """The fake network's loss on new samples of a batch's prompts."""
        sigma_data, guidance = self.settings.sigma_data, batch.trajectory.guidance
        with torch.no_grad():
            start = self._normal(f"start{name}", batch.trajectory.x0, index, step)
            x = self._sample(student, batch, index, step, name, start)
            forget_gathered(cast(nn.Module, student))
            s, z = self._noise(f"followed{name}", x, index, step, 0.0, 1.0)
            noised = renoise(x, z, s)
        F = self.fake.wrapped(noised / sigma_data, s, batch.condition, guidance).F
        return velocity_loss(F, x, z, s, sigma_data, self.samples_per_step)

    def after_backward(self, term: int, *, last_batch: bool) -> Figures:
        return self.adversary.learn(last=last_batch) if self.adversary else {}

    def update(self, finite: Tensor) -> tuple[Tensor, Figures]:
        """Updates of the fake network that are skipped count as well: a student must not follow one that never
        learns."""
        seen, self._seen = self._seen, []
        made = self.adversary.update(finite) if self.adversary else finite
        losses = torch.zeros_like(finite, dtype=torch.float32)
        for i in range(self.settings.fake.updates):
            pulse.beat(pulse.step)
            calls: list[Callable[[], Tensor]] = [partial(self._followed, *each, f" of update {i}") for each in seen]
            with phase("fake"):
                done, loss = self.fake.update(calls, finite)
            made, losses = made & done, losses + loss
        return made, {"fake_loss": losses / self.settings.fake.updates}

    def give_up(self) -> None:
        self._seen.clear()
        self.fake.give_up()
        if self.adversary:
            self.adversary.give_up()

    @property
    def beside(self) -> dict[str, Beside]:
        found = {"fake": Beside(self.fake.net, self.fake.optimizer)}
        if self.adversary:
            found["discriminator"] = Beside(self.adversary.heads, self.adversary.optimizer)
        return found

    def state(self) -> dict[str, Any]:
        return self.fake.state() | (self.adversary.state() if self.adversary else {})
