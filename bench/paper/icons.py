"""A run on icons, for real: trains with the trainer, and measures samples of the student that it saved."""

from __future__ import annotations

import json
import statistics
import time
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from paper.trainings import Run
from tbcm.config import Config
from tbcm.evaluation.agreement import relative_errors
from tbcm.evaluation.icons import TEACHER_STEPS, IconJudge, middle, spread
from tbcm.evaluation.speed import speed
from tbcm.evaluation.stored import key, stored, teacher_origin
from tbcm.inference.generation import Sampler
from tbcm.inference.student import load_student, open_origin
from tbcm.runtime.checkpoint_files import checkpoints_in
from tbcm.setup.networks import AnyNetwork, build_student, build_teacher, pipeline_of
from tbcm.setup.precision import student_weights
from tbcm.setup.text import build_text
from tbcm.train import train

NOISE_SEED = 1000
"""Plus the run's seed: of the noise of its samples, the same in all arms, and other than that of the teacher's samples
that they are compared with."""
AGREEMENT_PROMPTS = 256
SPEED_BATCH = 10  # as Sana's report, from which the paper has its throughputs


class IconRunner:
    """See `quality_runs.Runner`. What all runs share (teacher, text encoder, references) is made when first needed."""

    def __init__(self, base: Config, images: int, cache: Path, device: torch.device) -> None:
        self.base, self.images, self.cache, self.device = base, images, cache, device

    def train(self, run: Run) -> float:
        out = Path(run.config.out)
        done = checkpoints_in(out / "checkpoints")
        if run.config.train.steps not in done and train(run.config, resume=bool(done), device=self.device.type):
            raise KeyboardInterrupt  # it was asked to stop, and has saved
        return training_seconds(out, run.config.train.steps)

    def measure(self, run: Run, steps: int) -> dict[str, float]:
        _, few = self.floor, self._many_steps(run.seed)  # made before the clock starts
        started = time.monotonic()
        sampler, seed = self._sampler(run), NOISE_SEED + run.seed
        figures = self.judge(sampler(self.judge.prompts, steps=steps, seed=seed))
        errors = relative_errors(sampler.latents(self._few_prompts, steps=steps, seed=seed).cpu(), few)
        return {
            **figures,
            "agreement_error": errors.mean().item(),
            "evaluate_seconds": time.monotonic() - started,
        }

    @cached_property
    def floor(self) -> dict[str, float]:
        """What to read the figures beside."""
        return {**self.judge.floor(), **self.judge.text_floor()}

    def speed(self, run: Run, steps: int) -> dict[str, float]:
        """Of a network on this device; random weights would do as well."""
        guidance = middle(self.base.method.guidance)
        return speed(self._sampler(run), self.judge.prompts, steps=steps, guidance=guidance, batch=SPEED_BATCH)

    @cached_property
    def judge(self) -> IconJudge:
        return IconJudge(self.teacher, self.images, cache=self.cache, device=self.device)

    @cached_property
    def teacher(self) -> Sampler:
        net, text = build_teacher(self.base, self.device), build_text(self.base, self.device)
        return Sampler(net, text, self.base, pipeline_of(self.base), teacher=True, batch=64)

    @cached_property
    def _few_prompts(self) -> list[str]:
        prompts = self.judge.prompts
        return [prompts[i] for i in spread(min(AGREEMENT_PROMPTS, len(prompts)), len(prompts))]

    def _many_steps(self, seed: int) -> Tensor:
        """The teacher's latents of a few prompts from the noise that students are given."""
        guidance = middle(self.base.method.guidance)

        def make() -> dict[str, Tensor]:
            latents = self.teacher.latents(
                self._few_prompts, steps=TEACHER_STEPS, guidance=guidance, seed=NOISE_SEED + seed
            )
            return {"latents": latents.cpu()}

        made_from = {
            **teacher_origin(self.teacher.pipeline, self.base, self.device),
            "guidance": guidance,
            "steps": TEACHER_STEPS,
            "seed": NOISE_SEED + seed,
            "prompts": key({"prompts": self._few_prompts}),
        }
        return stored(self.cache, "latents", made_from, make)["latents"]

    def _sampler(self, run: Run) -> Sampler:
        if run.arm.net == "teacher":
            return self.teacher
        student, pipeline = self._student(run), self.teacher.pipeline
        return Sampler(student, self.teacher.text, run.config, pipeline, teacher=False, batch=64)

    def _student(self, run: Run) -> AnyNetwork:
        if run.arm.trained:
            return load_student(open_origin(run.config.out), self.device)
        student = build_student(run.config, self.teacher.net).eval()
        return student.to(student_weights(run.config, self.device))


def training_seconds(out: Path, steps: int) -> float:
    """Of a whole training, without checkpoints: the mean time of a logged step times `steps`, since a run that was
    resumed has logged no time for the steps that it gave up."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return steps * statistics.fmean(row["seconds_per_step"] for row in rows)
