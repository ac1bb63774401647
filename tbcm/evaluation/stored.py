"""Tensors that are made once and kept, under a name that says what they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import tbcm
from tbcm.config import Config
from tbcm.models.loading import AnyPipeline
from tbcm.runtime.files import atomic_path

Tensors = dict[str, Tensor]


def stored(folder: Path | None, name: str, made_from: Mapping[str, Any], make: Callable[[], Tensors]) -> Tensors:
    """`make()`, or what an earlier call kept in `folder` (None: nothing is kept) with the same `made_from` (JSON).

    A damaged file is made again.
    """
    if folder is None:
        return make()
    path = folder / f"{name}-{key(made_from)}.safetensors"
    if path.is_file():
        try:
            return load_file(path)
        except SafetensorError:
            pass  # cut short by something that does not write atomically, such as an interrupted copy
    tensors = make()
    with atomic_path(path) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, _metadata(made_from))
        part.chmod(0o644)  # safetensors lets only the owner read it
    return tensors


def key(made_from: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that tell mappings of JSON values apart."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


def _metadata(made_from: Mapping[str, Any]) -> dict[str, str]:
    return {"made_from": json.dumps(made_from, sort_keys=True)}


def fingerprint(pipeline: AnyPipeline) -> dict[str, Any]:
    """What tells pipelines' images apart: weights, VAE and scheduler of a folder; of a hub id its name and revision
    alone, so that one whose files change behind its name goes unnoticed."""
    folder = Path(pipeline.location)
    if not folder.is_dir():
        return {"hub": pipeline.location, "revision": pipeline.revision}
    files = sorted(file for part in ("transformer", "unet", "vae", "scheduler") for file in (folder / part).glob("*.*"))
    return {"sha256": {str(file.relative_to(folder)): sha256(file) for file in files}}


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def meaning(config: Config) -> dict[str, Any]:
    """The parts of a configuration that decide what comes of weights, a prompt and noise. A text encoder is known by
    its name or path alone."""
    return {
        "text": config.text.model_dump(mode="json", include={"encoder", "path", "max_tokens", "precision"}),
        "timestep_scale": config.teacher.timestep_scale,
        "null_mask": config.teacher.null_mask,
        "resolution": list(config.resolution[0]),
        "sigma_data": config.method.sigma_data,
    }


def teacher_origin(pipeline: AnyPipeline, config: Config, device: torch.device) -> dict[str, Any]:
    """What tells a teacher's samples from others', but for their prompts and settings. Code that changes within a
    version of this package goes unnoticed."""
    return {
        "pipeline": fingerprint(pipeline),
        **meaning(config),
        "precision": config.teacher.precision,
        "device": device.type,
        "tbcm": tbcm.__version__,
    }
