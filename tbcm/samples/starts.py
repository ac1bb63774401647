"""Where the samples of a method begin that makes them itself: noise and text, and data beside them where it compares
with some. No teacher is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tbcm.config.resolution import Size
from tbcm.data.captions import batch_epochs, batch_indices, drawn
from tbcm.data.latents import CaptionedLatents
from tbcm.method.types import Trajectory
from tbcm.runtime.distributed import local_slices
from tbcm.runtime.phases import phase
from tbcm.samples.rollouts import Batch, Draws, Stream, Text, draw, draw_size


class Starts:
    """At most `prompts_at_once` prompts at once (`tbcm.samples.rollouts.SampleSource`), each with its noise: a
    trajectory of the one point t_max, whose velocity nobody has asked for (zeros). Its x0 is that of the prompt's image
    where there are `latents`, whose captions are then the prompts; else zeros.

    Noise and guidance are the very draws that TBCM makes for the same seed and step. `shapes` are those of a latent
    [C, h, w], of each size that is trained on.
    """

    def __init__(
        self,
        text: Text,
        prompts: Sequence[str],
        latents: CaptionedLatents | None,
        *,
        shapes: Mapping[Size, Sequence[int]],
        guidance: Sequence[float],
        sigma_data: float,
        t_max: float,
        seed: int,
        prompts_per_step: int,
        prompts_at_once: int | None = None,
        device: torch.device,
    ) -> None:
        self.text, self.latents = text, latents
        self.prompts = prompts if latents is None else latents.captions
        self.shapes, self.guidance, self.sigma_data, self.t_max = shapes, guidance, sigma_data, t_max
        self.seed, self.prompts_per_step, self.device = seed, prompts_per_step, device
        self.slices = local_slices(prompts_per_step, prompts_at_once)
        self.batches, self.first_point, self.samples_per_prompt = len(self.slices), 0, 1

    def __call__(self, step: int) -> Iterator[Batch]:
        size = len(self.prompts), self.prompts_per_step, step
        indices, epochs = batch_indices(*size, self.seed), batch_epochs(*size)
        image_size = draw_size([*self.shapes], self.seed, step)
        shape = self.shapes[image_size]
        draws = draw(self.seed, step, self.prompts_per_step, shape, self.guidance, self._start, self.device)
        for some in self.slices:
            yield self._batch(indices[some], epochs[some], draws[some], image_size)

    def _start(self, stream: Stream) -> Tensor:
        return torch.full((1, 1), self.t_max, device=self.device)

    @torch.no_grad()
    def _batch(self, indices: list[int], epochs: list[int], draws: Draws, size: Size) -> Batch:
        x = self.sigma_data * draws.noise
        x0 = torch.zeros_like(x)
        if self.latents is not None:
            xbar0, indices = self.latents.latents(indices, size)
            x0 = self.sigma_data * xbar0
        prompts = [drawn(self.prompts, *place, self.seed) for place in zip(indices, epochs, strict=True)]
        with phase("text"):
            condition = self.text(prompts, size)
        t = draws.route.expand(len(prompts), 1)
        path = Trajectory(x[:, None], torch.zeros_like(x)[:, None], t, x0, draws.guidance)
        return Batch(path, condition, torch.ones_like(draws.guidance, dtype=torch.bool))
