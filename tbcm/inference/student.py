"""Trained students, read from a run or a pipeline folder (`tbcm.inference.exporting` writes them)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tbcm.config import Config, load_config, parse_config
from tbcm.errors import UserError
from tbcm.inference.pipeline_call import ADAPTER
from tbcm.models.families.pipeline import FamilyPipeline, open_pipeline
from tbcm.models.loading import AnyPipeline, freeze
from tbcm.models.pipeline import Pipeline
from tbcm.models.sana.students import load_teacher
from tbcm.runtime import checkpoint
from tbcm.runtime.ema import EMA
from tbcm.runtime.trained import TrainedWeights
from tbcm.setup.networks import (
    AnyNetwork,
    build_student,
    build_teacher,
    pipeline_of,
    untrained_teacher,
    with_flash_attention,
)
from tbcm.setup.precision import student_weights

RUN_CONFIG = "config.yaml"
PIPELINE_CONFIG = "tbcm.yaml"
NO_PROMPTS = os.devnull
"""Those of a pipeline that this package did not write."""


@dataclass(frozen=True)
class Origin:
    """A folder of this package (a run, or an exported pipeline) or any Sana pipeline of diffusers.

    `config` says how its text, latents and times are to be understood; `is_run` whether the weights are checkpoints.
    """

    path: str
    config: Config
    is_run: bool

    @property
    def pipeline(self) -> AnyPipeline:
        """Where VAE, text encoder and scheduler lie: the teacher's folder for a run."""
        if self.is_run:
            return pipeline_of(self.config)
        return open_pipeline(Pipeline(self.path, frames=self.config.frames))


def open_origin(path: str) -> Origin:
    """Raises UserError where `path` is neither a run nor a pipeline."""
    folder = Path(path)
    if (folder / RUN_CONFIG).is_file():
        config = load_config(folder / RUN_CONFIG)
        return Origin(path, config.model_copy(update={"out": path}), is_run=True)  # it may have been moved
    if (folder / ADAPTER).is_file():
        raise UserError(f"{path}: an adapter alone; load it with diffusers as its README.md says, or sample its run")
    if (folder / PIPELINE_CONFIG).is_file():
        config = load_config(folder / PIPELINE_CONFIG)
        # The folder has everything: what its configuration calls the teacher's is here.
        teacher = config.teacher.model_copy(update={"path": path, "revision": None, "variant": None})
        text = config.text.model_copy(update={"path": None})
        return Origin(path, config.model_copy(update={"teacher": teacher, "text": text}), is_run=False)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UserError(f"{path}: neither a run ({RUN_CONFIG}) nor a pipeline (model_index.json)")
    return Origin(path, _config_of_pipeline(path), is_run=False)


def open_run(path: str) -> Origin:
    """Raises UserError where `path` is no run."""
    origin = open_origin(path)
    if not origin.is_run:
        raise UserError(f"{path}: not a run (it has no {RUN_CONFIG})")
    return origin


def _config_of_pipeline(path: str) -> Config:
    """For a pipeline that this package did not write: its card, and beyond that the conventions of its class."""
    pipeline = open_pipeline(Pipeline(path))
    icons = path == "icons"
    return parse_config(
        {
            "out": "unused",
            "resolution": pipeline.trained_size,
            "teacher": {"path": path},
            "data": {"prompts": "icons" if icons else NO_PROMPTS},
        },
        path,
    )


def load_student(
    origin: Origin, device: torch.device, dtype: torch.dtype | None = None, *, average: bool = True
) -> AnyNetwork:
    """The frozen student, with weights in `dtype` (default: as configured): of a run, the newest checkpoint's (EMA
    weights, or the last ones); of a pipeline, its own."""
    dtype = dtype or student_weights(origin.config, device)
    if origin.is_run:
        return with_flash_attention(origin.config, student_of_run(origin, device, average=average).to(dtype))
    pipeline = origin.pipeline
    name, ours = pipeline.index.get("_class_name"), (Path(origin.path) / PIPELINE_CONFIG).is_file()
    if not ours and name != "SanaSprintPipeline":
        raise UserError(f"{origin.path}: a {name} is a teacher, not a few-step student; add --teacher")
    if isinstance(pipeline, FamilyPipeline):
        student = pipeline.load_teacher(dtype, device)  # its guidance is in its weights
        return with_flash_attention(origin.config, student)
    scale = 1.0 if name == "SanaSprintPipeline" else pipeline.timestep_scale
    return load_teacher(pipeline, dtype, device, timestep_scale=scale)


def student_of_run(origin: Origin, device: torch.device, *, average: bool) -> AnyNetwork:
    """The frozen student of a run's newest checkpoint, in fp32, with its adapters, if any, in its weights."""
    lora = origin.config.student.lora
    # Adapters are added to weights in full precision.
    teacher = build_teacher(origin.config, device, torch.float32 if lora else None)
    student = _of_checkpoint(origin, build_student(origin.config, teacher), average=average)
    if lora:
        from tbcm.models.lora import merge

        merge(student)
    return student


def adapter_of_run(origin: Origin, *, average: bool) -> AnyNetwork:
    """The frozen student of a LoRA run's newest checkpoint: what was trained, in fp32 on the CPU. The teacher's weights
    are not read, and have no data."""
    student = build_student(origin.config, untrained_teacher(origin.config, origin.pipeline, torch.device("meta")))
    for module in student.modules():
        for name, weight in [*module.named_parameters(recurse=False)]:
            if weight.requires_grad:
                setattr(module, name, nn.Parameter(torch.zeros(weight.shape)))
    return _of_checkpoint(origin, student, average=average)


def _of_checkpoint(origin: Origin, student: AnyNetwork, *, average: bool) -> AnyNetwork:
    """`student`, frozen, with what was trained."""
    if average:
        ema = EMA(student)
        checkpoint.load(origin.path, {"ema": ema})
        ema.copy_to(student)
    else:
        checkpoint.load(origin.path, {"student": TrainedWeights(student)})
    freeze(student)
    return student
