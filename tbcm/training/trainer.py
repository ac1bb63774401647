"""The loop: rollout, objective, backward, step, log, save (paper Algorithm 1)."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tbcm.config import Config
from tbcm.config.section import Precision
from tbcm.data.captions import digest
from tbcm.errors import UserError
from tbcm.method.types import TeacherNetwork
from tbcm.models.network import DiffusersNetwork
from tbcm.runtime import checkpoint, distributed
from tbcm.runtime.checkpoint_files import name_of
from tbcm.runtime.checkpoint_writer import CheckpointWriter
from tbcm.runtime.ema import EMA
from tbcm.runtime.failure import noted
from tbcm.runtime.guard import NonFiniteGuard
from tbcm.runtime.interrupt import StopRequest
from tbcm.runtime.log import MetricLog
from tbcm.runtime.optimizer import build_optimizer
from tbcm.runtime.parallel import accumulating, parallelize
from tbcm.runtime.phases import phase
from tbcm.runtime.profiling import StepProfiler
from tbcm.runtime.signs import pulse
from tbcm.runtime.trained import TrainedWeights
from tbcm.runtime.update import build_update
from tbcm.samples.rollouts import Batch
from tbcm.setup.parts import Parts
from tbcm.setup.precision import autocast, dtype_of, switch
from tbcm.training.methods import build_method
from tbcm.training.methods.method import Figures
from tbcm.training.preview import Previewer
from tbcm.training.statistics import StepStatistics

logger = logging.getLogger(__name__)


class Trainer:
    """A run. Everything that changes from step to step is the state that `save` writes and `resume` reads; all
    randomness is a function of (seed, step, position in the global batch)."""

    def __init__(self, config: Config, device: torch.device, parts: Parts) -> None:
        self.config, self.device, self.parts = config, device, parts
        self.out = Path(config.out)
        self.teacher, self.student, self.text = parts.teacher, parts.student, parts.text
        self.method = build_method(config, device, parts)
        self.source = self.method.source
        # Adapters are small: gathered at once, outside of what torch.func.jvp differentiates.
        self.blocks: Iterable[nn.Module] = () if config.student.lora else self.student.blocks
        self.wrapped = parallelize(self.student, self.blocks, config.parallel.mode, config.parallel.shard, device)
        self.dtype = dtype_of(config.student.precision, device)
        o, e = config.optimizer, config.ema
        self.parameters = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(o.name, self.parameters, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)
        self.ema = EMA(self.student, e.kind, sigma_rel=e.sigma_rel, halflife=e.halflife_steps, ramp_up=e.ramp_up)
        self.update = build_update(self.student, self.optimizer, self.ema, o.clip, fused=o.fused)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.guard = NonFiniteGuard(config.train.max_non_finite, device)
        self.statistics = StepStatistics(device, self.method.sample_figures, self.method.figures)
        self.figures: list[tuple[Figures, Figures]] = []  # of the step so far: of samples, and shares of the step's
        self.grad_norm = torch.zeros((), device=device)
        c = config.checkpoint
        self.writer = CheckpointWriter(
            self.out,
            keep_last=c.keep_last,
            keep_every=c.keep_every,
            asynchronous=c.asynchronous,
            timeout=timedelta(minutes=config.parallel.timeout_minutes),
        )
        self.step = 0
        self._save_begun: int | None = None  # of the newest

    # One step

    def train_step(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """One update from this step's prompts. Nothing is read back from the device.

        `stop` is asked before each micro-batch, since a step may take longer than a cluster waits after its signal. If
        it says so the step is given up (resumed, it is the same step again) and the answer is False: the state may be
        saved, but this trainer is not to go on.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        loss = self.gradients(stop)
        if loss is None:
            self._give_up()
            return False
        self.statistics.add_loss(loss)
        for samples, shares in self.figures:
            if samples:
                self.statistics.add(samples)
            self.statistics.add_shares(shares)
        self.figures.clear()
        with phase("optimizer"):
            self._update(loss)
        self.step += 1
        return True

    def gradients(self, stop: Callable[[], bool] = lambda: False) -> Tensor | None:
        """Adds this step's gradients to the student's weights. Returns the loss, or None if told to stop."""
        loss = torch.zeros((), device=self.device)
        for index, batch in enumerate(self.source(self.step)):
            part = self._accumulate(index, batch, stop)
            if part is None:
                return None
            loss += part
        return loss

    def _give_up(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.figures.clear()
        self.method.give_up()

    def _update(self, loss: Tensor) -> None:
        self.scaler.unscale_(self.optimizer)
        self.grad_norm, finite = self.update.clip()
        finite = distributed.all_true(finite & loss.isfinite())  # a loss may overflow and its gradient vanish
        self.update.step(finite)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        made, shares = self.method.update(finite)
        self.statistics.add_shares(shares)
        self.guard.update(made, loss)

    def _accumulate(self, index: int, batch: Batch, stop: Callable[[], bool]) -> Tensor | None:
        """Adds the gradient of the step's `index`-th batch, term by term. Returns its part of the loss, or None if told
        to stop."""
        total = torch.zeros((), device=self.device)
        terms = self.method.terms(self.wrapped, batch, index, self.step)
        last_batch = index == self.source.batches - 1
        for i, term in enumerate(terms):
            pulse.beat(self.step)
            if stop():
                return None
            with accumulating(self.wrapped, last=last_batch and i == len(terms) - 1), self.autocast():
                with phase("forward"):
                    loss = term()
                with phase("backward"):
                    # Gradients are averaged over ranks, and each rank's loss is its share of the global mean.
                    self.scaler.scale(loss.value * distributed.world_size()).backward()
            total += loss.value.detach()
            self.figures.append((loss.samples, loss.shares))
            self.figures.append(({}, self.method.after_backward(i, last_batch=last_batch)))
        return total

    def autocast(self) -> torch.autocast:
        return autocast(self.dtype, self.device)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, constant, linear cool-down over the last steps."""
        o, left = self.config.optimizer, max(0, self.config.train.steps - step)
        return o.lr * min(1.0, (step + 1) / (o.warmup_steps + 1), left / (o.cooldown_steps + 1))

    # The run

    def run(self) -> bool:
        """Trains to the last step, the time limit or a request to stop, and saves at the end in each case.

        Returns whether it was asked to stop (Ctrl-C, SIGTERM).
        """
        logger.info("%s", describe(self.config, self.device, self.teacher))
        steps, log_every, save_every = self.config.train.steps, self.config.log.every, self.config.checkpoint.every
        preview_every = self.config.log.preview_every
        self._clock = time.monotonic(), self.step
        with (
            MetricLog(self.out, steps, is_main=distributed.is_main(), start_step=self.step) as log,
            StopRequest() as stop,
            contextlib.closing(self.writer),
            noted(),
        ):
            previewer = Previewer(self.config, self.parts, self.wrapped, self.ema) if preview_every else None
            if previewer and self.step == 0:
                self._off_the_clock(lambda: previewer(log, self.step))
            profiler = StepProfiler(self.out, self.config.profile.steps, self.device)
            started = time.monotonic()

            def asked() -> bool:  # ranks agree on it, over the host alone
                return distributed.any_rank(stop.stop_requested)

            while self.step < steps and not self._out_of_time(started):
                with profiler.step(self.step):
                    if not self.train_step(asked):
                        break
                log.advance()
                if self.step % log_every == 0 or self.step == steps:
                    self._log(log)
                if self.step % save_every == 0:
                    self._off_the_clock(self.save)
                if previewer and self.step % preview_every == 0:
                    self._off_the_clock(lambda: previewer(log, self.step))
                if distributed.any_rank(self.writer.failed):
                    self._off_the_clock(self._settle)
            self._settle()
            if self._save_begun != self.step:
                self._check_finite()
                self.save()
            self.writer.wait()
            stopped = asked()
        if self.step < steps:
            why = "asked to stop" if stopped else "out of time"
            logger.info("%s after step %d of %d; what was reached is saved", why, self.step, steps)
        return stopped

    def _out_of_time(self, started: float) -> bool:
        minutes = self.config.train.max_minutes
        return minutes is not None and distributed.any_rank(time.monotonic() - started > 60 * minutes)

    def _off_the_clock(self, work: Callable[[], None]) -> None:
        """Previews and checkpoints do not count as training in the reported rate."""
        started = time.monotonic()
        work()
        self._clock = self._clock[0] + time.monotonic() - started, self._clock[1]

    def _log(self, log: MetricLog) -> None:
        """Writes a row of metrics: the only place where figures are read from the device."""
        then, step_then = self._clock
        self._clock = time.monotonic(), self.step
        seconds_per_step = (self._clock[0] - then) / (self.step - step_then)
        figures = self.statistics.summary() | {"grad_norm": self.grad_norm}
        self.statistics.reset()
        log.log(
            self.step,
            {
                **figures,
                **self.method.scheduled(self.step - 1),
                "lr": self.learning_rate(self.step - 1),
                "samples_per_s": self.method.samples_per_step / seconds_per_step,
                "seconds_per_step": seconds_per_step,
                "skipped_updates": self.guard.total,
                "peak_gib": peak_memory_gib(self.device),
            },
        )
        self._check_finite()

    def _check_finite(self) -> None:
        self.guard.check(self.step, self.writer.saved and self.writer.saved[1])

    # State

    def _state(self) -> dict[str, Any]:
        return {
            "student": TrainedWeights(self.student),
            "ema": self.ema,
            "optimizer": self.optimizer,
            "guard": self.guard,
            "statistics": self.statistics,
            "scaler": self.scaler,
            **self.method.state(),
        }

    def save(self) -> None:
        """Begins a checkpoint; the training may go on while it is written (`CheckpointWriter`)."""
        self._is_written()
        self.writer.save(self.step, self._state(), self._described)
        self._save_begun = self.step

    def _settle(self) -> None:
        """Waits for the checkpoint in flight. Where it failed, the present state is saved in its place; if that fails
        too, the run ends."""
        if not self._is_written():
            self.save()
            self.writer.wait()

    def _is_written(self) -> bool:
        """Waits for the checkpoint in flight. That it failed (a full disk) is an error in the log, not the run's end:
        the next one may succeed, and earlier ones are whole."""
        try:
            self.writer.wait()
        except UserError as error:
            if distributed.is_main():
                logger.error("%s; saving step %d in its place", error, self.step)
            return False
        return True

    @cached_property
    def _described(self) -> dict[str, Any]:
        """The configuration, and the prompts that it only names. Every rank asks for it."""
        config, latents = self.config.model_dump(mode="json"), self.parts.latents
        texts = latents.captions if latents is not None else self.parts.prompts
        config["data"]["prompts_digest"] = distributed.run_on_main(lambda: digest(texts))
        return config

    def resume(self) -> None:
        """Continues from the newest whole checkpoint of the run."""
        manifest = checkpoint.load(self.out, self._state(), optional={"scaler": "fp16's loss scale"})
        self.step = self._save_begun = int(manifest["step"])
        self.writer.saved = self.step, self.out / "checkpoints" / name_of(self.step)
        changed = changes(manifest["config"], self._described)
        if changed and distributed.is_main():
            logger.warning("the configuration is not the checkpoint's: %s", ", ".join(changed))
        logger.info("resumed after step %d", self.step)


def describe(config: Config, device: torch.device, net: TeacherNetwork | None = None) -> str:
    """What the switches come to on this machine, in a line; `net` is the teacher."""
    student, teacher, general = config.student, config.teacher, isinstance(net, DiffusersNetwork)
    parts = [
        f"{device.type}: {config.method.name}, student in {_precision(student.precision, device)}",
        *[f"{student.tangent} {'jvp' if general else student.derivative} tangents"] * config.method.continuous,
        f"checkpointing {student.checkpointing}",
        "compiled" if switch(student.compile, device) else "eager",
        f"teacher in {_precision(teacher.precision, device)}",
        "compiled" if switch(teacher.compile, device) else "eager",
    ]
    parts += ["flash-attn"] * (isinstance(net, DiffusersNetwork) and net.uses_flash_attention)
    parts += ["fp8"] * teacher.fp8
    parts += [f"LoRA of rank {student.lora.rank} on its weights"] if student.lora else []
    parts += ["rollout as a CUDA graph"] * (device.type == "cuda" and switch(teacher.cuda_graph, device))
    parts += ["overlapped"] * config.train.overlap_rollout
    return ", ".join(parts)


def _precision(name: Precision, device: torch.device) -> str:
    return str(dtype_of(name, device)).removeprefix("torch.")


def changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """What changed, as "key: old -> new"."""
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += changes(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} -> {b}")
    return found


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: the CUDA allocator's, or on a CPU the resident set's high-water mark."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
