"""Students as pipeline folders that plain diffusers runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import SanaSprintPipeline, SCMScheduler
from torch import nn

from tbcm.errors import UserError
from tbcm.inference.pipeline_call import family_card, model_card
from tbcm.inference.student import PIPELINE_CONFIG, Origin, load_student, open_run
from tbcm.models.embedders import fold_guidance
from tbcm.models.families.pipeline import FamilyPipeline
from tbcm.models.families.writing import copy_pipeline
from tbcm.models.network import DiffusersNetwork
from tbcm.models.pipeline import Pipeline
from tbcm.models.sana.guidance import without_guidance
from tbcm.models.sana.network import SanaTrigFlow
from tbcm.runtime.files import atomic_folder
from tbcm.setup.text import text_pipeline_of


def export(run: str, out: Path, *, dtype: torch.dtype, average: bool = True) -> None:
    """Writes a run's student as a folder that plain diffusers loads: of Sana as a SanaSprintPipeline, or where its time
    is not that pipeline's as the teacher's own, which it is of all other families.

    Raises:
        UserError: not a run, no checkpoint, or a student or a teacher that no pipeline of diffusers can express.
    """
    origin = open_run(run)
    check_jumps(origin)
    own = None if is_sprints(origin) else own_pipeline(origin)
    student = load_student(origin, torch.device("cpu"), torch.float32, average=average)
    if own is not None:
        write_own_pipeline(student, own, origin, out, dtype)
    else:
        assert isinstance(student, SanaTrigFlow)
        write_sprint_pipeline(student, origin, out, dtype)


def check_jumps(origin: Origin) -> None:
    """Raises UserError for a student that no exported scheduler would sample as it was trained."""
    if (jumps := origin.config.method.jumps) > 1:
        raise UserError(
            f"{origin.path}: a student of {jumps} phases (method.phases) goes from one to the next without noise, which"
            " exported pipelines' schedulers add; tbcm.sample can run it, but it cannot be exported"
        )


def is_sprints(origin: Origin) -> bool:
    """Whether SanaSprintPipeline, which passes its network the flow-matching time s in [0, 1], runs this student."""
    pipeline = origin.pipeline
    return isinstance(pipeline, Pipeline) and abs(pipeline.timestep_scale - 1) <= 1e-6


def own_pipeline(origin: Origin) -> FamilyPipeline:
    """The teacher's own pipeline. Raises UserError where it does not call the network as the student was trained."""
    pipeline = origin.pipeline
    if isinstance(pipeline, FamilyPipeline):
        return pipeline
    name = pipeline.index.get("_class_name")
    if name != "SanaPipeline" or pipeline.config("transformer")["guidance_embeds"]:
        raise UserError(
            f"{origin.path}: its teacher's network time is {pipeline.timestep_scale:g} s, and no pipeline of diffusers"
            f" passes that to a {name} that embeds guidance; tbcm.sample can run it, but it cannot be exported so"
        )
    family = FamilyPipeline(pipeline)
    own = float(getattr(family.formulation, "scale", 1.0))
    if abs(own - pipeline.timestep_scale) > 1e-6 * own:
        raise UserError(
            f"{origin.path}: teacher.timestep_scale = {pipeline.timestep_scale:g} is not what its own pipeline gives"
            f" the network ({own:g}); tbcm.sample can run it, but it cannot be exported so"
        )
    return family


def write_sprint_pipeline(student: SanaTrigFlow, origin: Origin, out: Path, dtype: torch.dtype) -> None:
    """A SanaSprintPipeline folder: the student's transformer, the teacher's VAE and text encoder, and a scheduler."""
    config = origin.config
    backbone = student.backbone.to(dtype)
    # This is what SanaSprintPipeline does, whatever the teacher's schedulers do.
    backbone.register_to_config(timestep_scale=1.0)
    tokenizer, text_encoder = _text_parts(origin, dtype)
    pipeline = SanaSprintPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=origin.pipeline.load_vae(dtype),
        transformer=backbone,
        scheduler=SCMScheduler(sigma_data=config.method.sigma_data),
    )
    with atomic_folder(out) as part:
        pipeline.save_pretrained(part)
        _write_texts(part, origin, model_card(config, str(out), dtype))


def write_own_pipeline(
    student: SanaTrigFlow | DiffusersNetwork, pipeline: FamilyPipeline, origin: Origin, out: Path, dtype: torch.dtype
) -> None:
    """A folder of the teacher's own pipeline class, with the student's network and a scheduler that samples it.

    Where the class embeds no guidance, that of the middle scale trained on is folded into the weights.
    """
    config = origin.config
    few, scale = pipeline.few_steps(1, config.resolution[0]), config.method.default_guidance
    if isinstance(student, SanaTrigFlow):
        network: nn.Module = without_guidance(student, scale)
        text = dict(zip(("tokenizer", "text_encoder"), _text_parts(origin, dtype), strict=True))
    else:
        network, text = student.backbone, {}
        if student.guidance_embedding is not None:
            fold_guidance(network, student.guidance_embedding, scale)
    with atomic_folder(out) as part:
        copy_pipeline(pipeline, network.to(dtype), few.scheduler, part, dtype, **text)
        _write_texts(part, origin, family_card(pipeline, config, str(out), dtype))


def _write_texts(part: Path, origin: Origin, card: str) -> None:
    (part / PIPELINE_CONFIG).write_text(origin.config.to_yaml(), encoding="utf-8")
    (part / "README.md").write_text(card, encoding="utf-8")


def _text_parts(origin: Origin, dtype: torch.dtype) -> tuple[Any, Any]:
    """Gemma's tokenizer and Gemma; None for other encoders, for which the pipeline is to be given embeddings."""
    if origin.config.text.encoder != "gemma2":
        return None, None
    return text_pipeline_of(origin.config).load_text_encoder(dtype)
