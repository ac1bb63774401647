"""Image sheets of fixed prompts and noise during training: the average student in 1, 2, 4 steps above its teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tbcm.build import pipeline_of
from tbcm.generation import Sampler, middle
from tbcm.images import sheet
from tbcm.runtime import distributed

if TYPE_CHECKING:
    from tbcm.runtime.log import MetricLog
    from tbcm.trainer import Trainer

STEPS = (1, 2, 4)
TEACHER_STEPS = 20


class Previewer:
    """Draws a sheet on rank 0."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        config, parts = trainer.config, trainer.parts
        self.prompts = config.log.preview_prompts or [parts.prompts[i] for i in range(min(8, len(parts.prompts)))]

        def sampler(teacher: bool) -> Sampler:
            return Sampler(
                parts.teacher if teacher else parts.student,
                parts.text,
                pipeline_of(config),
                parts.black.shape,
                teacher=teacher,
                sigma_data=config.method.sigma_data,
                t_max=config.teacher.t_max,
                guidance=middle(config.method.guidance),
            )

        self.student, self.teacher = sampler(False), sampler(True)
        self._teacher_images: Tensor | None = None

    def __call__(self, log: MetricLog) -> None:
        if not distributed.is_main():
            return
        if self._teacher_images is None:
            self._teacher_images = self.teacher(self.prompts, steps=TEACHER_STEPS)
        with self.trainer.ema.swap(self.trainer.student), self.trainer.autocast():
            latents = [(f"student {n}", self.student.latents(self.prompts, steps=n)) for n in STEPS]
        rows = [(label, self.student.decode(x)) for label, x in latents]
        rows.append((f"teacher {TEACHER_STEPS}", self._teacher_images))
        log.image("preview", sheet(rows, self.prompts), self.trainer.step)
