"""Prompts of a configuration, and what encodes them."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from tbcm.config import Config
from tbcm.data.captions import PromptSource
from tbcm.data.conditions import CachedConditions
from tbcm.data.embeddings import CachedEncoder
from tbcm.data.prompts import load_prompts
from tbcm.errors import UserError
from tbcm.models.families.pipeline import FamilyPipeline
from tbcm.models.identity import model_identity
from tbcm.models.pipeline import Pipeline
from tbcm.models.text import MiniLMEncoder, TextEncoder, load_gemma, sana_instruction
from tbcm.runtime import distributed
from tbcm.samples.rollouts import Text, TextConditions
from tbcm.setup.networks import files_of, pipeline_of
from tbcm.setup.precision import dtype_of, weights_dtype


def build_prompts(config: Config) -> PromptSource:
    """Kept in the run's folder: checkpoints need it to be shared by all nodes anyway."""
    path = config.data.prompts
    shipped = resources.files("tbcm.icons") / "assets" / "prompts.txt"
    return load_prompts(
        str(shipped) if path == "icons" else path, config.data.column, folder=Path(config.out) / "prompts"
    )


def text_pipeline_of(config: Config) -> Pipeline:
    """Where Gemma and its tokenizer lie."""
    path, teacher = config.text.path, config.teacher
    return Pipeline(path, variant=teacher.variant) if path else files_of(config)


def build_text(config: Config, device: torch.device) -> Text:
    """With a text encoder, whether or not the configuration names a cache."""
    teacher = pipeline_of(config)
    if isinstance(teacher, FamilyPipeline):
        return teacher.load_text(weights_dtype(dtype_of(config.text.precision, device)), device)
    return TextConditions(build_encoder(config, device), config.teacher.null_mask)


def build_encoder(config: Config, device: torch.device) -> TextEncoder:
    """Sana's."""
    if config.text.encoder == "minilm":
        encoder = MiniLMEncoder(config.text.max_tokens, device)
        check_text_width(config, encoder.dim)
        return encoder
    pipeline = text_pipeline_of(config)
    check_text_width(config, pipeline.text_width())
    dtype = text_weights(config, device)
    return load_gemma(pipeline, dtype=dtype, device=device, max_tokens=config.text.max_tokens)


def check_text_width(config: Config, width: int, teacher: Pipeline | None = None) -> None:
    """Raises UserError where the teacher (default: that of the configuration) takes in text states of another width."""
    if (wanted := (teacher or files_of(config)).config("transformer")["caption_channels"]) != width:
        raise UserError(
            f"text.encoder={config.text.encoder} gives states of width {width}, and the teacher {config.teacher.path}"
            f" takes in caption_channels = {wanted}: choose the text encoder that it was trained with"
        )


def text_weights(config: Config, device: torch.device) -> torch.dtype:
    """How the text encoder's weights are kept. MiniLM is small; Gemma-2 overflows in fp16."""
    small = config.text.encoder == "minilm"
    return torch.float32 if small else weights_dtype(dtype_of(config.text.precision, device))


def text_identity(config: Config) -> dict[str, Any]:
    """What decides a prompt's states, but for rounding: a cache must agree with the configuration in all of it."""
    text, teacher = config.text, pipeline_of(config)
    if isinstance(teacher, FamilyPipeline):
        return {
            "teacher.path": model_identity(teacher.location, teacher.revision, teacher.text_parts),
            "pipeline": teacher.family.pipeline,
            "resolution": [list(size) for size in config.resolution],
        }
    gemma = text.encoder == "gemma2"
    where, revision = (text.path, None) if text.path else (teacher.location, teacher.revision)
    return {
        "text.encoder": text.encoder,
        "text.path": model_identity(where, revision, ["tokenizer", "text_encoder"]) if gemma else None,
        "text.max_tokens": text.max_tokens,
        "instruction": hashlib.sha256("\n".join(sana_instruction()).encode()).hexdigest()[:16] if gemma else None,
    }


def build_cached_text(config: Config, prompts: PromptSource, device: torch.device) -> Text:
    """Without a text encoder. Raises UserError where the cache is not of this configuration and these prompts."""
    assert config.text.cache is not None
    family = isinstance(pipeline_of(config), FamilyPipeline)
    cached = CachedConditions(config.text.cache, device) if family else CachedEncoder(config.text.cache, device)
    cached.check(distributed.run_on_main(lambda: {**text_identity(config), "data.prompts": prompts.digest()}))
    if unknown := [prompt for prompt in config.log.preview_prompts if prompt not in cached]:
        raise UserError(f"log.preview_prompts: {unknown[0]!r} is not in text.cache={config.text.cache}; take it out")
    if isinstance(cached, CachedConditions):
        return cached
    check_text_width(config, cached.dim)
    return TextConditions(cached, config.teacher.null_mask)
