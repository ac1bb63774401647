"""`tbcm.train CONFIG --dry-run`: build everything, take one step, say what it costs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tbcm.config import Config
from tbcm.config.resolution import Size, largest
from tbcm.errors import UserError
from tbcm.method.rollout import Velocity
from tbcm.models.network import DiffusersNetwork
from tbcm.runtime import distributed
from tbcm.runtime.parallel import shard_size
from tbcm.setup.parts import Parts, build_parts
from tbcm.training.accounting import CostCounter, SizesAlone
from tbcm.training.holdings import gathered, holdings, on_a_rank
from tbcm.training.methods.method import Figures, Term
from tbcm.training.random_parts import random_parts, taken_architecture
from tbcm.training.trainer import Trainer, peak_memory_gib


def dry_run(config: Config, device_name: str | None) -> None:
    """Prints parameters, FLOPs of a step, what each rank will hold and its peak memory; with a GPU, takes a real step
    after that and prints the peak that was measured. Of several sizes of images the largest is taken, which decides
    what memory is needed.

    FLOPs are counted in an eager step on tensors without data (PyTorch's meta device, behind fake tensors), where no
    compiled graph or kernel hides a product; memory is the sum of the live tensors. Rollouts that follow one another in
    a step cost the same: one is run, the gradients it adds to being there from the start, and its FLOPs are multiplied.
    So are those of its micro-batches. Weights are random, which cost the same: the teacher's configuration files are
    enough, and where those are not on this machine its architecture. A text is as long as its pipeline takes. Under
    torchrun it is the run of as many ranks.
    """
    device = distributed.init(device_name)
    sizes, config = config.resolution, config.model_copy(update={"resolution": (largest(config.resolution),)})
    slices = distributed.local_slices(config.train.prompts_per_step, config.train.prompts_per_rollout)
    prompts, rollouts = slices[0].stop - slices[0].start, len(slices)
    if distributed.is_main():
        print(account(config, prompts, rollouts, sizes), flush=True)
    if device.type == "cuda":
        # The second rollout finds the gradients of the first; what follows would cost the same.
        few = prompts * min(rollouts, 2) * distributed.world_size()
        measured = measure(_with_prompts(config, few), device)
        if distributed.is_main():
            print(_lines({"measured": measured}))
    distributed.shutdown()


def account(config: Config, prompts: int, rollouts: int, sizes: Sequence[Size]) -> str:
    """What the step costs, of which a rank takes `rollouts` rollouts of `prompts` prompts each. `config` has one size,
    the largest of `sizes`."""
    shard = shard_size(config.parallel.shard) if config.parallel.mode == "fsdp" else 1
    trainer, flops, peak = counted(_with_prompts(as_on_a_gpu(eager(config)), prompts), rollouts)
    figures = report(trainer, prompts, rollouts, flops)
    return _lines({"images": _of_sizes(sizes)} | figures | memory_report(trainer, rollouts, shard, peak))


def counted(config: Config, rollouts: int) -> tuple[Trainer, int, int]:
    """A trainer that has taken the first of a step's `rollouts`, in which all prompts of `config` are; FLOPs of that,
    and the peak memory in bytes from when the trainer was begun. Nothing has data."""
    with distributed.alone(), SizesAlone(), CostCounter() as counter:
        device = torch.device("cpu")
        trainer = Trainer(config, device, random_parts(config, device))
        if rollouts > 1:
            for parameter in trainer.parameters:
                parameter.grad = torch.zeros_like(parameter)
        flops, repeats = counter.flops, Repeats(trainer, counter, gradients=rollouts > 1)
        trainer.train_step()
    return trainer, counter.flops - flops + repeats.flops, counter.peak


class Repeats:
    """Leaves out of a step what costs the same as what is run, and counts its FLOPs: `flops`. Of a rollout the teacher
    is run in its first point. Of the micro-batches are run one that finds the gradients of another, and the last, which
    may be smaller; the figures of that one stand for those of the ones that are left out, since statistics cost, too.

    Args:
        gradients: are there before the step.
    """

    def __init__(self, trainer: Trainer, counter: CostCounter, *, gradients: bool) -> None:
        self.flops, self._counter, self._noted = 0, counter, trainer.figures
        self._first, self._before, self._left_out = 1 if gradients else 2, 0, 0
        method: Any = trainer.method
        teacher: Any = method.teacher
        self._terms, self._after_backward, self._velocity = method.terms, method.after_backward, teacher.velocity
        method.terms, method.after_backward, teacher.velocity = self._few, self._counted, self._once

    def _once(self, *arguments: Any) -> Velocity:
        velocity = self._velocity(*arguments)
        known: dict[torch.Size, tuple[torch.Size, int]] = {}

        def answer(u: Tensor, t: Tensor) -> Tensor:
            if u.shape in known:
                shape, flops = known[u.shape]
                self.flops += flops
                return u.new_empty(shape)
            before = self._counter.flops
            F = velocity(u, t)
            known[u.shape] = F.shape, self._counter.flops - before
            return F

        return answer

    def _few(self, *arguments: Any) -> list[Term]:
        terms, self._before = self._terms(*arguments), self._spent
        self._left_out = max(0, len(terms) - self._first - 1)
        return [*terms[: self._first], terms[-1]] if self._left_out else terms

    def _counted(self, term: int, *, last_batch: bool) -> Figures:
        place = term if term < self._first else term + self._left_out
        figures = self._after_backward(place, last_batch=last_batch)
        if term == self._first - 1:
            self.flops += self._left_out * (self._spent - self._before)
            self._noted += self._left_out * self._noted[-1:]
        self._before = self._spent
        return figures

    @property
    def _spent(self) -> int:
        """FLOPs so far, of what was run and of what was not."""
        return self._counter.flops + self.flops


def _of_sizes(sizes: Sequence[Size]) -> str:
    height, width = largest(sizes)
    rest = f", the largest of {len(sizes)} sizes: all that follows is of a step of it" if len(sizes) > 1 else ""
    return f"{height} x {width} px{rest}"


def measure(config: Config, device: torch.device) -> str:
    """The peak memory of a real step."""
    parts, source = _parts_or_random(config, device)
    trainer = Trainer(config, device, parts)
    trainer.train_step()
    torch.cuda.synchronize(device)
    return f"{peak_memory_gib(device):.2f} GiB at the peak ({torch.cuda.get_device_name(device)}, {source})"


def _with_prompts(config: Config, prompts: int) -> Config:
    """The same, with this many prompts a step."""
    return config.model_copy(update={"train": config.train.model_copy(update={"prompts_per_step": prompts})})


def report(trainer: Trainer, prompts: int, rollouts: int, flops: int) -> dict[str, str]:
    """`flops` of a rollout."""
    config, world = trainer.config, distributed.world_size()
    encoders = trainer.text.modules
    family = isinstance(trainer.teacher, DiffusersNetwork)
    encoder = config.text.cache or (config.teacher.path if family else config.text.encoder)
    each = trainer.source.samples_per_prompt
    taken = f", taken to be {name}" if (name := taken_architecture(config)) else ""
    total = prompts * rollouts * world
    tera = flops * rollouts / 1e12
    return {
        "teacher": f"{_parameters(trainer.teacher)} ({config.teacher.path}{taken})",
        "student": _student(trainer),
        "text encoder": f"{_parameters(nn.ModuleList(encoders)) if encoders else 'none'} ({encoder})",
        "step": (
            f"{total} {'images' if config.method.from_images else 'prompts'} x {each} points = {total * each}"
            f" samples optimised; {world} rank(s) x {rollouts} rollout(s) of {prompts} prompt(s)"
        ),
        "FLOPs a step": f"{tera:.4g} TFLOP on each rank ({tera * world / (total * each):.4g} a sample)",
    }


def _student(trainer: Trainer) -> str:
    """Its size and, where most of it is the teacher's, what is trained."""
    tensors, lora = len(trainer.parameters), trainer.config.student.lora
    if lora is None:
        return f"{_parameters(trainer.student)}, {tensors} tensors trained"
    trained = _millions(sum(p.numel() for p in trainer.parameters))
    return f"{_parameters(trainer.student)}, of which {trained} trained in {tensors} tensors (LoRA of rank {lora.rank})"


def memory_report(trainer: Trainer, rollouts: int, shard: int, peak: int) -> dict[str, str]:
    """`peak`: bytes, of a step with a whole student."""
    size = trainer.config.train.points_per_micro_batch
    accumulates = rollouts > 1 or (size is not None and size < trainer.source.samples_per_prompt)
    whole = holdings(trainer)
    held = on_a_rank(whole, shard, accumulates=accumulates)
    if shard > 1:
        peak += sum(held.values()) - sum(whole.values()) + gathered(trainer.student, trainer.blocks)
    sizes = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in held.items() if size)
    over = f"student over {shard} ranks" if shard > 1 else "student on each"
    return {
        "a rank holds": f"{sum(held.values()) / 2**30:.2f} GiB: {sizes} ({over})",
        "peak memory": f"{peak / 2**30:.2f} GiB (accounted, not measured: live tensors, in the precision of a GPU)",
    }


def _lines(lines: dict[str, str]) -> str:
    return "\n".join(f"{name:>14}: {value}" for name, value in lines.items())


def _parts_or_random(config: Config, device: torch.device) -> tuple[Parts, str]:
    try:
        return build_parts(config, device), "loaded"
    except UserError as error:
        if config.teacher.architecture is None:
            raise
        logging.getLogger("tbcm").warning("%s; taking random weights of %s", error, config.teacher.architecture)
        return random_parts(config, device), "random weights"


def as_on_a_gpu(config: Config) -> Config:
    """Where a precision is auto, what it would be on a GPU."""

    update = {
        name: section.model_copy(update={"precision": "bf16"})
        for name, section in (("teacher", config.teacher), ("text", config.text), ("student", config.student))
        if section.precision == "auto"
    }
    return config.model_copy(update=update)


def eager(config: Config) -> Config:
    """The same, without what changes no product and needs a GPU: compilation, capture, overlap, the fused update and
    flash-attn."""
    without: dict[str, dict[str, Any]] = {
        "teacher": {"compile": False, "cuda_graph": False, "flash": False},
        "student": {"compile": False},
        "optimizer": {"fused": False},
        "train": {"overlap_rollout": False},
    }
    update = {name: getattr(config, name).model_copy(update=changes) for name, changes in without.items()}
    return config.model_copy(update=update)


def _parameters(model: nn.Module) -> str:
    return f"{_millions(sum(p.numel() for p in model.parameters()))} parameters"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"
