"""Images from prompts: the student in a few steps, the teacher in many. For previews, `tbcm.sample` and the demo."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tbcm.build import build_teacher, build_text
from tbcm.images import to_uint8
from tbcm.method.rollout import embedded, rollout
from tbcm.method.sampling import consistency_sample, student_times
from tbcm.method.trigflow import time_from_flow
from tbcm.method.types import Condition
from tbcm.models.loading import Pipeline, decode_latents
from tbcm.models.sana import SanaTrigFlow
from tbcm.rollouts import TextConditions, teacher_velocity
from tbcm.runtime.seeding import generator
from tbcm.student import load_student, open_source


class NoiseSource:
    """Standard-normal noise for a list of images; image i's depends on (seed, i) alone, not on its batch or device."""

    def __init__(self, seed: int, images: range, shape: Sequence[int], device: torch.device) -> None:
        self._generators = [generator("cpu", seed, i, "sample") for i in images]
        self._shape, self._device = tuple(shape), device

    def __call__(self) -> Tensor:
        """The next draw, [images, C, H, W] fp32."""
        return torch.stack([torch.randn(self._shape, generator=g) for g in self._generators]).to(self._device)


def teacher_times(steps: int, shift: float) -> Tensor:
    """A flow-Euler schedule with its shift, [steps] descending TrigFlow times (0 not included)."""
    q = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
    return time_from_flow(shift * q / (1 + (shift - 1) * q)).float()


class Sampler:
    """Prompts -> scaled latents or images, in batches. Image i of a call depends on (prompt i, seed, i) alone.

    `net` is a student (few steps, guidance through its embedding) or, with `teacher`, a teacher (first-order steps of
    its guided ODE, along a flow schedule of `shift`). `shape` is that of a latent, [C, h, w].
    """

    def __init__(
        self,
        net: SanaTrigFlow,
        text: TextConditions,
        pipeline: Pipeline,
        shape: Sequence[int],
        *,
        teacher: bool,
        sigma_data: float,
        t_max: float,
        guidance: float,
        batch: int = 32,
    ) -> None:
        self.net, self.text, self.pipeline, self.shape, self.teacher = net, text, pipeline, tuple(shape), teacher
        self.sigma_data, self.t_max, self.guidance, self.batch = sigma_data, t_max, guidance, batch

    def __call__(self, prompts: Sequence[str], *, steps: int, guidance: float | None = None, seed: int = 0) -> Tensor:
        """Images [P, 3, H, W] uint8, on the CPU."""
        return self.decode(self.latents(prompts, steps=steps, guidance=guidance, seed=seed))

    @torch.no_grad()
    def latents(self, prompts: Sequence[str], *, steps: int, guidance: float | None = None, seed: int = 0) -> Tensor:
        """Scaled latents xbar_0 [P, C, h, w], fp32."""
        parts = []
        for start in range(0, len(prompts), self.batch):
            chunk = list(prompts[start : start + self.batch])
            noise = NoiseSource(seed, range(start, start + len(chunk)), self.shape, next(self.net.parameters()).device)
            parts.append(self._sample(self.text(chunk), noise, steps, self.guidance if guidance is None else guidance))
        return torch.cat(parts)

    def _sample(self, condition: Condition, noise: NoiseSource, steps: int, guidance: float) -> Tensor:
        start = noise() * self.sigma_data
        w = torch.full((len(condition),), guidance, device=start.device)
        if self.teacher:
            velocity = teacher_velocity(self.net, condition, self.text.null(condition), w)
            times = teacher_times(steps, self.pipeline.sampling_shift).to(start.device)[None]
            x0 = rollout(velocity, start, times, w, self.sigma_data).x0
        else:
            velocity = embedded(self.net, condition, w)
            x0 = consistency_sample(velocity, start, student_times(steps, self.t_max), self.sigma_data, noise)
        return x0 / self.sigma_data

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> images [P, 3, H, W] uint8 on the CPU. The VAE is in memory only while it decodes."""
        vae = self.pipeline.load_vae(torch.float32).to(latents.device)
        size = max(1, 2**21 // latents[0].numel() // (8 * 8 * 3))  # a few images at 1024 px, hundreds at 64
        return torch.cat([to_uint8(decode_latents(vae, part)).cpu() for part in latents.split(size)])


def open_sampler(path: str, *, teacher: bool = False, average: bool = True, device: str | None = None) -> Sampler:
    """From a run, a pipeline folder, a hub id or 'emoji'. `teacher`: a run's teacher, or a folder that is one."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = open_source(path)
    net = build_teacher(source.config, place) if teacher else load_student(source, place, average=average)
    backbone = net.backbone.config
    return Sampler(
        net,
        build_text(source.config, place),
        source.pipeline,
        (backbone.in_channels, backbone.sample_size, backbone.sample_size),
        teacher=teacher,
        sigma_data=source.config.method.sigma_data,
        t_max=source.config.teacher.t_max,
        guidance=middle(source.config.method.guidance),
    )


def middle(scales: Sequence[float]) -> float:
    """The guidance to sample with: the middle one of those trained on."""
    return sorted(scales)[len(scales) // 2]
