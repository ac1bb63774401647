"""Images from prompts: the student in a few steps, the teacher in many. For previews, `tbcm.sample` and the demo."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tbcm.config import Config
from tbcm.config.methods import Pcm
from tbcm.config.resolution import Size
from tbcm.errors import UserError
from tbcm.inference.images import to_uint8
from tbcm.inference.student import load_student, open_origin
from tbcm.method.lcm import Timesteps
from tbcm.method.pcm import edges, phased_sample
from tbcm.method.rollout import Velocity, embedded, rollout
from tbcm.method.sampling import consistency_sample
from tbcm.method.types import Condition
from tbcm.models.loading import AnyPipeline
from tbcm.runtime.distributed import pick_device
from tbcm.runtime.seeding import generator
from tbcm.samples.rollouts import GuidedTeacher, Text
from tbcm.setup.networks import build_teacher
from tbcm.setup.precision import autocast, dtype_of, teacher_autocast
from tbcm.setup.text import build_text

TEACHER_STEPS = 20


class NoiseSource:
    """Standard-normal noise for a list of images; image i's depends on (seed, i) alone, not on its batch or device."""

    def __init__(self, seed: int, images: range, shape: Sequence[int], device: torch.device) -> None:
        self._generators = [generator("cpu", seed, i, "sample") for i in images]
        self._shape, self._device = tuple(shape), device

    def __call__(self) -> Tensor:
        """The next draw, [images, C, H, W] fp32."""
        return torch.stack([torch.randn(self._shape, generator=g) for g in self._generators]).to(self._device)


class Sampler:
    """Prompts -> scaled latents or images, in batches. Image i of a call depends on (prompt i, seed, i) alone; a call
    for a part of a longer list says with `first` where in it the part begins.

    `net` is a student (few steps, guidance through its embedding) or, with `teacher`, a teacher (first-order steps of
    its guided ODE along a flow schedule, from t = pi/2). A student of several phases takes as many steps. What the
    configuration says of latents, times, guidance and precision holds, and weights that are kept in more precision are
    cast; `pipeline` has the VAE. Images have the size
    `size` (default: the first of those trained on).
    """

    def __init__(
        self,
        net: Any,
        text: Text,
        config: Config,
        pipeline: AnyPipeline,
        *,
        teacher: bool,
        batch: int = 32,
        size: Size | None = None,
    ) -> None:
        self.net, self.text, self.config, self.pipeline = net, text, config, pipeline
        self.batch, device = batch, next(net.parameters()).device
        self.dtype = dtype_of((config.teacher if teacher else config.student).precision, device)
        self.size = size or config.resolution[0]
        pipeline.check_size(self.size)
        self.shape = pipeline.latent_shape(self.size)
        self.teacher = (
            GuidedTeacher(net, text, lambda: teacher_autocast(config, device), [self.size]) if teacher else None
        )

    def __call__(
        self, prompts: Sequence[str], *, steps: int, guidance: float | None = None, seed: int = 0, first: int = 0
    ) -> Tensor:
        """Images [P, 3, H, W] uint8, on the CPU."""
        return self.decode(self.latents(prompts, steps=steps, guidance=guidance, seed=seed, first=first))

    @property
    def default_steps(self) -> int:
        """In how many steps images are made if nothing is said: 20 of a teacher, whose few steps show nothing."""
        return TEACHER_STEPS if self.teacher else self.config.method.default_steps

    @torch.no_grad()
    def latents(
        self, prompts: Sequence[str], *, steps: int, guidance: float | None = None, seed: int = 0, first: int = 0
    ) -> Tensor:
        """Scaled latents xbar_0 [P, C, h, w], fp32. Guidance defaults to the middle one of those trained on."""
        scale = self.config.method.default_guidance if guidance is None else guidance
        device, parts = next(self.net.parameters()).device, []
        for start in range(0, len(prompts), self.batch):
            chunk = list(prompts[start : start + self.batch])
            begin = first + start
            noise = NoiseSource(seed, range(begin, begin + len(chunk)), self.shape, device)
            parts.append(self.sample(self.text(chunk, self.size), noise, steps, scale))
        return torch.cat(parts)

    @torch.no_grad()
    def sample(self, condition: Condition, noise: Callable[[], Tensor], steps: int, guidance: float) -> Tensor:
        """Scaled latents of one batch of encoded prompts; each call of `noise` is a draw [P, C, h, w]."""
        sigma_data = self.config.method.sigma_data
        start = noise() * sigma_data
        w = torch.full((len(condition),), guidance, device=start.device)
        if self.teacher:
            velocity = self.teacher.velocity(self.teacher.prepare(condition), w, self.size)
            times = self.pipeline.teacher_times(steps, self.size).to(start.device)[None]
            return rollout(velocity, start, times, w, sigma_data).x0 / sigma_data
        cast = any(parameter.dtype != self.dtype for parameter in self.net.parameters())
        with autocast(self.dtype if cast else torch.float32, start.device):
            return self._jumped(embedded(self.net, condition, w), start, steps, noise) / sigma_data

    def _jumped(self, velocity: Velocity, start: Tensor, steps: int, noise: Callable[[], Tensor]) -> Tensor:
        """The student's x_0 from noise."""
        method = self.config.method
        if method.jumps == 1:
            few = self.pipeline.student_times(steps, self.size)
            return consistency_sample(velocity, start, few, method.sigma_data, noise)
        if steps != method.jumps:
            raise UserError(
                f"a student of {method.jumps} phases (method.phases) is sampled in {method.jumps} steps, not {steps}"
            )
        assert isinstance(method, Pcm)
        times = edges(Timesteps(self.net.t_max, method.solver.shift), method.phases)
        return phased_sample(velocity, start, times, method.sigma_data)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> images [P, 3, H, W] uint8 on the CPU. The VAE is on the device only while it decodes."""
        vae = self._vae and self._vae.to(latents.device)
        images = [part.cpu() for part in decode_in_parts(self.pipeline, vae, latents)]
        if self._vae:
            self._vae.to("cpu")
        return torch.cat(images)

    @cached_property
    def _vae(self) -> Any:
        return self.pipeline.load_vae(torch.float32)


def decode_in_parts(pipeline: AnyPipeline, vae: Any, latents: Tensor) -> Iterator[Tensor]:
    """Scaled latents -> images [P, 3, H, W] uint8 on the same device, two million pixels at a time."""
    pixels = latents[0, 0].numel() * pipeline.compression**2
    for part in latents.split(max(1, 2**21 // pixels)):
        yield to_uint8(pipeline.decode(vae, part))


def open_sampler(
    path: str, *, teacher: bool = False, average: bool = True, device: str | None = None, size: Size | None = None
) -> Sampler:
    """From a run, a pipeline folder, a hub id or 'icons'. `teacher`: a run's teacher, or a folder that is one.

    Raises:
        UserError: there is none, or it makes no images of that size.
    """
    place = pick_device(device)
    origin = open_origin(path)
    origin.pipeline.check_size(size or origin.config.resolution[0])  # before weights are read
    net = build_teacher(origin.config, place) if teacher else load_student(origin, place, average=average)
    return Sampler(net, build_text(origin.config, place), origin.config, origin.pipeline, teacher=teacher, size=size)
