"""Where sCM's training samples come from: images encoded by the VAE, noised, with the teacher's velocity there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from diffusers import AutoencoderDC

from tbcm.config import Method
from tbcm.data.images import CaptionedImages
from tbcm.data.prompts import batch_indices
from tbcm.method.route import logit_normal_times
from tbcm.method.scm import scm_trajectory
from tbcm.models.loading import encode_images
from tbcm.rollouts import Batch, Draws, GuidedTeacher, TextConditions, draw
from tbcm.runtime.distributed import local_parts
from tbcm.runtime.phases import phase
from tbcm.runtime.seeding import generator


class EncodedImages:
    """sCM's source: noised images, at most `prompts_per_rollout` at once (see `tbcm.rollouts.Source`).

    Every sample costs a text encoding, a VAE encoding and one teacher velocity. Noise and guidance are the very draws
    that TBCM makes for the same seed and step. `latent_shape` [C, h, w] is that of one encoded image.
    """

    def __init__(
        self,
        teacher: GuidedTeacher,
        vae: AutoencoderDC,
        text: TextConditions,
        images: CaptionedImages,
        *,
        latent_shape: Sequence[int],
        method: Method,
        t_max: float,
        seed: int,
        prompts_per_step: int,
        prompts_per_rollout: int | None = None,
    ) -> None:
        self.teacher, self.vae, self.text, self.images = teacher, vae, text, images
        self.latent_shape, self.method, self.t_max, self.seed = latent_shape, method, t_max, seed
        self.prompts_per_step = prompts_per_step
        self.parts = local_parts(prompts_per_step, prompts_per_rollout)
        self.batches, self.first_point, self.samples_per_prompt = len(self.parts), 0, 1

    def __call__(self, step: int) -> Iterator[Batch]:
        indices = batch_indices(len(self.images), self.prompts_per_step, step, self.seed)
        draws = self._draw(step)
        for part in self.parts:
            yield self._batch(indices[part], draws[part])

    def _draw(self, step: int) -> Draws:
        """The draws of the step's global batch, as in `draw`, with a route of one logit-normal time per image."""
        count, sigma_data, device = self.prompts_per_step, self.method.sigma_data, self.vae.device
        draws = draw(self.seed, step, count, self.latent_shape, self.method, self.t_max, device)
        normal = torch.randn(count, generator=generator(device, self.seed, step, "time"), device=device)
        law = self.method.route
        t = logit_normal_times(normal, self.t_max, sigma_data=sigma_data, mean=law.p_mean, std=law.p_std)
        return replace(draws, route=t[:, None])

    @torch.no_grad()
    def _batch(self, indices: list[int], draws: Draws) -> Batch:
        sigma_data = self.method.sigma_data
        with phase("text"):
            condition = self.text([self.images.captions[i] for i in indices])
        with phase("vae"):
            x0 = sigma_data * encode_images(self.vae, self.images.images(indices).to(self.vae.device))
        noise, t = draws.noise * sigma_data, draws.route[:, 0]
        with phase("teacher"):
            velocity = self.teacher.velocity(self.teacher.prepare(condition), draws.guidance)
            trajectory = scm_trajectory(velocity, x0, noise, t, draws.guidance, sigma_data)
        keep = torch.ones_like(draws.guidance, dtype=torch.bool)  # the brightness filter is TBCM's
        return Batch(trajectory, condition, keep)
