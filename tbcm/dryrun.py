"""`tbcm.train CONFIG --dry-run`: build everything, take one step, say what it costs."""

from __future__ import annotations

import logging

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tbcm.accounting import CostCounter
from tbcm.build import Parts, build_parts
from tbcm.config import Config
from tbcm.errors import UserError
from tbcm.random_parts import random_parts
from tbcm.runtime import distributed
from tbcm.trainer import Trainer, peak_memory_gib


def dry_run(config: Config, device_name: str | None) -> None:
    """Takes one step of the configured run and prints parameters, FLOPs and peak memory.

    FLOPs are counted in an eager step on tensors without data (PyTorch's meta device, behind fake tensors), where no
    compiled graph or kernel hides a product. With a GPU a real step gives the memory; without one it is the sum of the
    live tensors, not a measurement. Rollouts that follow one another in a step cost the same: one is run, the gradients
    it adds to being there from the start, and its FLOPs are multiplied.
    Where the teacher is not on this machine its architecture gets random weights, which cost the same.
    """
    device = distributed.init(device_name)
    config, rollouts = _one_rollout(config)
    with FakeTensorMode(allow_non_fake_inputs=True), CostCounter() as counter:
        trainer = _trainer(as_on_a_gpu(eager(config)), torch.device("cpu"), None, rollouts)
        resident, flops = counter.live, counter.flops
        trainer.train_step()
    flops, source = counter.flops - flops, "random weights"
    memory = (
        f"{counter.peak / 2**30:.2f} GiB, {resident / 2**30:.2f} GiB of it resident (accounted, not measured: live"
        " tensors on the meta device, in the precision of a GPU)"
    )
    if device.type == "cuda":
        parts, source = _parts_or_random(config, device)
        trainer = _trainer(config, device, parts, rollouts)
        trainer.train_step()
        torch.cuda.synchronize(device)
        memory = f"{peak_memory_gib(device):.2f} GiB (measured on {torch.cuda.get_device_name(device)})"
    print(report(trainer, rollouts, source, flops, memory))


def _trainer(config: Config, device: torch.device, parts: Parts | None, rollouts: int) -> Trainer:
    trainer = Trainer(config, device, parts or random_parts(config, device))
    if rollouts > 1:
        for parameter in trainer.parameters:
            parameter.grad = torch.zeros_like(parameter)
    return trainer


def _one_rollout(config: Config) -> tuple[Config, int]:
    """The configuration with a single rollout a step, and how many a rank takes one after another."""
    parts = distributed.local_parts(config.train.prompts_per_step, config.train.prompts_per_rollout)
    prompts = parts[0].stop - parts[0].start
    train = config.train.model_copy(update={"prompts_per_step": prompts * distributed.world_size()})
    return config.model_copy(update={"train": train}), len(parts)


def report(trainer: Trainer, rollouts: int, source: str, flops: int, memory: str) -> str:
    config, world = trainer.config, distributed.world_size()
    model = getattr(trainer.text.encoder, "model", None)
    prompts, samples = config.train.prompts_per_step * rollouts, trainer.samples_per_step * rollouts
    tera = flops * rollouts / 1e12
    lines = {
        "teacher": f"{_parameters(trainer.teacher)}, {source} ({config.teacher.path})",
        "student": f"{_parameters(trainer.student)}, {len(trainer.parameters)} tensors trained",
        "text encoder": f"{_parameters(model) if model is not None else 'none'} ({config.text.encoder})",
        "step": (
            f"{prompts} {'images' if config.method.name == 'scm' else 'prompts'} x"
            f" {trainer.source.samples_per_prompt} points = {samples} samples optimised;"
            f" {world} rank(s) x {rollouts} rollout(s) of {config.train.prompts_per_step // world} prompt(s)"
        ),
        "FLOPs a step": f"{tera:.4g} TFLOP on this rank ({tera * world / samples:.4g} a sample)",
        "peak memory": memory,
    }
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
    """The same, but neither compiled nor captured."""
    teacher = config.teacher.model_copy(update={"compile": False, "cuda_graph": False})
    student = config.student.model_copy(update={"compile": False})
    return config.model_copy(update={"teacher": teacher, "student": student})


def _parameters(model: nn.Module) -> str:
    count = sum(p.numel() for p in model.parameters())
    return f"{count / 1e6:,.1f} M parameters"
