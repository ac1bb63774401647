"""Trained students: read from a run or a pipeline folder, written as a pipeline folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SanaSprintPipeline, SCMScheduler

from tbcm.build import AnyNetwork, build_student, default_guidance, pipeline_of, student_weights, text_pipeline_of
from tbcm.config import Config, load_config, parse_config
from tbcm.errors import UserError
from tbcm.inference.pipeline_call import family_card, model_card
from tbcm.models.embedders import fold_guidance
from tbcm.models.families.pipeline import FamilyPipeline, open_pipeline
from tbcm.models.families.writing import copy_pipeline
from tbcm.models.loading import AnyPipeline, freeze
from tbcm.models.network import DiffusersNetwork
from tbcm.models.pipeline import Pipeline
from tbcm.models.sana.network import SanaTrigFlow
from tbcm.runtime import checkpoint
from tbcm.runtime.ema import EMA
from tbcm.runtime.files import atomic_folder
from tbcm.runtime.trained import TrainedWeights

RUN_CONFIG = "config.yaml"
PIPELINE_CONFIG = "tbcm.yaml"
ADAPTER = "pytorch_lora_weights.safetensors"
"""diffusers' name."""


@dataclass(frozen=True)
class Source:
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
        return open_pipeline(Pipeline(self.path))


def open_source(path: str) -> Source:
    """Raises UserError where `path` is neither a run nor a pipeline."""
    folder = Path(path)
    if (folder / RUN_CONFIG).is_file():
        config = load_config(folder / RUN_CONFIG)
        return Source(path, config.model_copy(update={"out": path}), is_run=True)  # it may have been moved
    if (folder / ADAPTER).is_file():
        raise UserError(f"{path}: an adapter alone; load it with diffusers as its README.md says, or sample its run")
    if (folder / PIPELINE_CONFIG).is_file():
        config = load_config(folder / PIPELINE_CONFIG)
        # The folder has everything: what its configuration calls the teacher's is here.
        teacher = config.teacher.model_copy(update={"path": path, "revision": None, "variant": None})
        text = config.text.model_copy(update={"path": None})
        return Source(path, config.model_copy(update={"teacher": teacher, "text": text}), is_run=False)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UserError(f"{path}: neither a run ({RUN_CONFIG}) nor a pipeline (model_index.json)")
    return Source(path, _config_of_pipeline(path), is_run=False)


def open_run(path: str) -> Source:
    """Raises UserError where `path` is no run."""
    source = open_source(path)
    if not source.is_run:
        raise UserError(f"{path}: not a run (it has no {RUN_CONFIG})")
    return source


def _config_of_pipeline(path: str) -> Config:
    """For a pipeline that this package did not write: the icons stand-in, else the conventions of its class."""
    pipeline = open_pipeline(Pipeline(path))
    icons = path == "icons"
    return parse_config(
        {
            "out": "unused",
            "resolution": pipeline.trained_size,
            "teacher": {"path": path, "null_mask": "own" if icons else "conditional"},
            "text": {"encoder": "minilm", "max_tokens": 16} if icons else {},
            "method": {"guidance": [2.5]} if icons else {},
            "data": {"prompts": "unused"},
        },
        path,
    )


def load_student(
    source: Source, device: torch.device, dtype: torch.dtype | None = None, *, average: bool = True
) -> AnyNetwork:
    """The frozen student, with weights in `dtype` (default: as configured): of a run, the newest checkpoint's (EMA
    weights, or the last ones); of a pipeline, its own."""
    dtype = dtype or student_weights(source.config, device)
    if source.is_run:
        return student_of_run(source, device, average=average).to(dtype)
    pipeline = source.pipeline
    name = pipeline.index.get("_class_name")
    if isinstance(pipeline, FamilyPipeline) and (Path(source.path) / PIPELINE_CONFIG).is_file():
        return pipeline.load_teacher(dtype, device)  # its guidance is in its weights
    if isinstance(pipeline, FamilyPipeline) or name != "SanaSprintPipeline":
        raise UserError(f"{source.path}: a {name} is a teacher, not a few-step student; add --teacher")
    backbone = pipeline.load_transformer(dtype).to(device)
    net = SanaTrigFlow(backbone, timestep_scale=1.0, differentiable=False)
    freeze(net)
    return net


def student_of_run(source: Source, device: torch.device, *, average: bool, merged: bool = True) -> AnyNetwork:
    """The frozen student of a run's newest checkpoint, in fp32; `merged`: with its adapters, if any, in its weights."""
    from tbcm.build import build_teacher

    lora = source.config.student.lora
    # Adapters are added to weights in full precision.
    teacher = build_teacher(source.config, device, torch.float32 if lora else None)
    student = build_student(source.config, teacher)
    if average:
        ema = EMA(student)
        checkpoint.load(source.path, {"ema": ema})
        ema.copy_to(student)
    else:
        checkpoint.load(source.path, {"student": TrainedWeights(student)})
    freeze(student)
    if lora and merged:
        from tbcm.models.lora import merge

        merge(student)
    return student


def export(run: str, out: Path, *, dtype: torch.dtype, average: bool = True) -> None:
    """Writes a run's student as a folder that plain diffusers loads as SanaSprintPipeline.

    Raises:
        UserError: not a run, no checkpoint, or a teacher whose time SanaSprintPipeline cannot express.
    """
    source = open_run(run)
    if isinstance(source.pipeline, Pipeline):
        check_exportable(source, source.pipeline)
    student = load_student(source, torch.device("cpu"), torch.float32, average=average)
    if isinstance(student, DiffusersNetwork):
        write_family_pipeline(student, source, out, dtype)
    else:
        write_pipeline(student, source, out, dtype)


def check_exportable(source: Source, pipeline: Pipeline) -> None:
    """SanaSprintPipeline passes its network the flow-matching time s in [0, 1] itself."""
    scale = pipeline.timestep_scale
    if abs(scale - 1) > 1e-6:
        raise UserError(
            f"{source.path}: its teacher's network time is {scale:g} s, and SanaSprintPipeline always passes s in"
            " [0, 1]; tbcm.sample can run it, but it cannot be exported"
        )


def write_pipeline(student: SanaTrigFlow, source: Source, out: Path, dtype: torch.dtype) -> None:
    """A SanaSprintPipeline folder: the student's transformer, the teacher's VAE and text encoder, and a scheduler."""
    config = source.config
    backbone = student.backbone.to(dtype)
    backbone.register_to_config(
        timestep_scale=1.0
    )  # what SanaSprintPipeline does, whatever the teacher's schedulers do
    tokenizer, text_encoder = _text_parts(source, dtype)
    pipeline = SanaSprintPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=source.pipeline.load_vae(dtype),
        transformer=backbone,
        scheduler=SCMScheduler(sigma_data=config.method.sigma_data),
    )
    with atomic_folder(out) as part:
        pipeline.save_pretrained(part)
        (part / PIPELINE_CONFIG).write_text(config.to_yaml(), encoding="utf-8")
        (part / "README.md").write_text(model_card(config, str(out), dtype), encoding="utf-8")


def write_family_pipeline(student: DiffusersNetwork, source: Source, out: Path, dtype: torch.dtype) -> None:
    """A folder of the teacher's own pipeline class, with the student's network and a scheduler that samples it.

    Where the class embeds no guidance, that of the middle scale trained on is folded into the weights.
    """
    pipeline, config = source.pipeline, source.config
    assert isinstance(pipeline, FamilyPipeline)
    few = pipeline.few_steps(1, config.resolution[0])
    scale = default_guidance(config)
    if student.guidance_embedding is not None:
        fold_guidance(student.backbone, student.guidance_embedding, scale)
    with atomic_folder(out) as part:
        copy_pipeline(pipeline, student.backbone.to(dtype), few.scheduler, part, dtype)
        (part / PIPELINE_CONFIG).write_text(config.to_yaml(), encoding="utf-8")
        (part / "README.md").write_text(family_card(pipeline, config, str(out), dtype), encoding="utf-8")


def _text_parts(source: Source, dtype: torch.dtype) -> tuple[Any, Any]:
    """Gemma and its tokenizer; None for other encoders, for which SanaSprintPipeline is to be given embeddings."""
    if source.config.text.encoder != "gemma2":
        return None, None
    return text_pipeline_of(source.config).load_text_encoder(dtype)
