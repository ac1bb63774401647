"""Image sheets of fixed prompts and noise during training: the average student in few steps above its teacher."""

from __future__ import annotations

import logging

from torch import Tensor, nn

from tbcm.config import Config
from tbcm.errors import UserError
from tbcm.inference.generation import TEACHER_STEPS, Sampler
from tbcm.inference.images import sheet
from tbcm.runtime import distributed
from tbcm.runtime.ema import EMA
from tbcm.runtime.log import MetricLog
from tbcm.runtime.parallel import forget_gathered, is_sharded
from tbcm.setup.networks import pipeline_of
from tbcm.setup.parts import Parts

logger = logging.getLogger(__name__)

STEPS = (1, 2, 4)


class Previewer:
    """Draws a sheet, on rank 0."""

    def __init__(self, config: Config, parts: Parts, wrapped: nn.Module, ema: EMA) -> None:
        """`wrapped`: the student as it is over many ranks; `ema`: its average."""
        self.config, self.parts, self.wrapped, self.ema = config, parts, wrapped, ema
        self.prompts = config.log.preview_prompts or [parts.prompts[i * len(parts.prompts) // 8] for i in range(8)]

        text, pipeline = parts.text, pipeline_of(config)
        self.student = Sampler(parts.student, text, config, pipeline, teacher=False, batch=4)
        jumps = config.method.jumps
        self.steps = STEPS if jumps == 1 else (jumps,)
        self._teacher_images: Tensor | None = None

    def __call__(self, log: MetricLog, step: int) -> None:
        """A preview that cannot be made (no VAE, no memory, a student that diverged) is a warning: the run goes on.

        A sharded student is asked by all ranks, since each holds a part of it; there an error ends the run, as the
        others would wait for the rank that had it.
        """
        sharded = is_sharded(self.wrapped)
        latents = self._latents() if sharded else []
        if not distributed.is_main():
            return
        try:
            self._draw(log, step, latents or self._latents())
        except (UserError, RuntimeError, OSError) as error:
            logger.warning("no preview at step %d: %s", step, error)

    def _latents(self) -> list[Tensor]:
        """The average student's, for each of its `steps`."""
        with self.ema.swap(self.parts.student):
            try:
                return [self.student.latents(self.prompts, steps=n) for n in self.steps]
            finally:
                forget_gathered(self.wrapped)  # averages, which the next step would train with

    def _draw(self, log: MetricLog, step: int, latents: list[Tensor]) -> None:
        if self._teacher_images is None:
            parts, config = self.parts, self.config
            # Not kept: it would hold the null prompt's keys and values a second time.
            teacher = Sampler(parts.teacher, parts.text, config, self.student.pipeline, teacher=True, batch=4)
            self._teacher_images = teacher(self.prompts, steps=TEACHER_STEPS)
        rows = [(f"student {n}", self.student.decode(x)) for n, x in zip(self.steps, latents, strict=True)]
        rows.append((f"teacher {TEACHER_STEPS}", self._teacher_images))
        log.image("preview", sheet(rows, self.prompts), step)
