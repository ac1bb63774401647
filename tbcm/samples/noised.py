"""Where the baselines' training samples come from if not from trajectories: latents of images, noised, with the
teacher's velocity there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tbcm.config.methods import Noised
from tbcm.config.resolution import Size
from tbcm.data.bad import GoodImages
from tbcm.data.captions import batch_epochs, batch_indices, drawn
from tbcm.data.images import CaptionedImages
from tbcm.data.latents import CaptionedLatents
from tbcm.method.route import logit_normal_times
from tbcm.method.scm import scm_trajectory
from tbcm.models.loading import AnyPipeline
from tbcm.runtime.distributed import local_slices
from tbcm.runtime.phases import phase
from tbcm.samples.rollouts import Batch, Draws, GuidedTeacher, Stream, Text, draw, draw_size


class VaeLatents:
    """`CaptionedLatents` of images that the VAE encodes when they are asked for, on its device. At most
    `max_bad_share` of them may be such that cannot be decoded."""

    def __init__(
        self, pipeline: AnyPipeline, vae: Any, images: CaptionedImages, device: torch.device, max_bad_share: float = 0.0
    ) -> None:
        self.pipeline, self.vae, self.device = pipeline, vae, device
        self.images, self.captions = images, images.captions
        self._good = GoodImages(images, max_bad_share)

    def __len__(self) -> int:
        return len(self.images)

    def latents(self, indices: Sequence[int], size: Size) -> tuple[Tensor, list[int]]:
        """See `CaptionedLatents`. Raises UserError where too many images cannot be decoded."""
        with phase("vae"):
            images, taken = self._good(indices, size)
            if self.device.type == "cuda":
                images = images.pin_memory()  # else the host would wait for the copy
            return self.pipeline.encode(self.vae, images.to(self.device, non_blocking=True)), taken


class NoisedLatents:
    """The baselines': noised latents, at most `prompts_at_once` at once (`tbcm.samples.rollouts.SampleSource`).

    Every sample costs a text encoding, one teacher velocity and, unless it is precomputed, a VAE encoding. Noise and
    guidance are the very draws that TBCM makes for the same seed and step. `shapes` are those of a latent [C, h, w], of
    each size that is trained on.
    """

    def __init__(
        self,
        teacher: GuidedTeacher,
        text: Text,
        latents: CaptionedLatents,
        *,
        shapes: Mapping[Size, Sequence[int]],
        method: Noised,
        t_max: float,
        seed: int,
        prompts_per_step: int,
        prompts_at_once: int | None = None,
        device: torch.device,
    ) -> None:
        self.teacher, self.text, self.latents = teacher, text, latents
        self.shapes, self.method, self.t_max, self.seed, self.device = shapes, method, t_max, seed, device
        self.prompts_per_step = prompts_per_step
        self.slices = local_slices(prompts_per_step, prompts_at_once)
        self.batches, self.first_point, self.samples_per_prompt = len(self.slices), 0, 1

    def __call__(self, step: int) -> Iterator[Batch]:
        size = len(self.latents), self.prompts_per_step, step
        indices, epochs = batch_indices(*size, self.seed), batch_epochs(*size)
        image_size = draw_size([*self.shapes], self.seed, step)
        draws = self._draw(step, self.shapes[image_size])
        for some in self.slices:
            yield self._batch(indices[some], epochs[some], draws[some], image_size)

    def _draw(self, step: int, shape: Sequence[int]) -> Draws:
        guidance = self.method.guidance
        return draw(self.seed, step, self.prompts_per_step, shape, guidance, self._draw_times, self.device)

    def _draw_times(self, stream: Stream) -> Tensor:
        """A logit-normal time for each image [P, 1]."""
        normal = torch.randn(self.prompts_per_step, generator=stream("time"), device=self.device)
        law, sigma_data = self.method.times, self.method.sigma_data
        return logit_normal_times(normal, self.t_max, sigma_data=sigma_data, mean=law.mean, std=law.std)[:, None]

    @torch.no_grad()
    def _batch(self, indices: list[int], epochs: list[int], draws: Draws, size: Size) -> Batch:
        sigma_data = self.method.sigma_data
        xbar0, taken = self.latents.latents(indices, size)
        captions = [drawn(self.latents.captions, *place, self.seed) for place in zip(taken, epochs, strict=True)]
        with phase("text"):
            condition = self.text(captions, size)
        x0 = sigma_data * xbar0
        noise, t = draws.noise * sigma_data, draws.route[:, 0]
        with phase("teacher"):
            velocity = self.teacher.velocity(self.teacher.prepare(condition), draws.guidance, size)
            trajectory = scm_trajectory(velocity, x0, noise, t, draws.guidance, sigma_data)
        keep = torch.ones_like(draws.guidance, dtype=torch.bool)  # the brightness filter is TBCM's
        return Batch(trajectory, condition, keep)
