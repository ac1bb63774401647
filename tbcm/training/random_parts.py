"""The parts of a run with random weights, which cost what real ones cost: for dry runs and benchmarks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tbcm.config import Config
from tbcm.config.resolution import Size
from tbcm.errors import UserError, shown
from tbcm.models.families.pipeline import open_pipeline
from tbcm.models.loading import AnyPipeline, freeze
from tbcm.models.pipeline import Pipeline
from tbcm.models.preset_files import ARCHITECTURES, write_preset
from tbcm.samples.noised import VaeLatents
from tbcm.setup.networks import build_student, check_teacher, files_of, untrained_teacher
from tbcm.setup.parts import Parts
from tbcm.setup.precision import default_dtype, dtype_of
from tbcm.training.random_text import random_text


def random_parts(config: Config, device: torch.device) -> Parts:
    """The parts of a run with random weights: of the configuration files at teacher.path, or of teacher.architecture
    where no such folder is on this machine.

    Raises:
        UserError: a folder or hub id without the files of a known pipeline.
    """
    with _configuration_files(config) as files:
        pipeline, shapes = _opened(config, files)
        teacher = untrained_teacher(config, pipeline, device)
        black = {size: torch.zeros(shape, device=device) for size, shape in shapes.items()}
        text = random_text(config, pipeline, device)
        prompts = [f"prompt {i}" for i in range(config.train.prompts_per_step)]
        student = build_student(config, teacher)
        if not config.method.from_images:
            return Parts(teacher, student, text, prompts, black)
        if config.data.latents is not None:
            return Parts(teacher, student, text, prompts, black, RandomLatents(prompts, black))
        vae = _vae(pipeline, dtype_of(config.teacher.precision, device), device)
        latents = VaeLatents(pipeline, vae, RandomImages(prompts), device)
        return Parts(teacher, student, text, prompts, black, latents, vae)


def taken_architecture(config: Config) -> str | None:
    """teacher.architecture, where teacher.path is no folder on this machine. Raises UserError where none has that
    name."""
    name = config.teacher.architecture
    if name is not None and name not in ARCHITECTURES:
        raise UserError(f"teacher.architecture = {shown(name)}: should be one of {', '.join(ARCHITECTURES)}")
    return None if Path(files_of(config).location).is_dir() else name


@contextmanager
def _configuration_files(config: Config) -> Iterator[Pipeline]:
    """A folder or hub id. That of an architecture is there for as long as it is read."""
    files, name = files_of(config), taken_architecture(config)
    if name is None:
        yield files
        return
    with tempfile.TemporaryDirectory() as folder:
        write_preset(name, Path(folder))
        yield replace(files, path=folder, revision=None)


def _opened(config: Config, files: Pipeline) -> tuple[AnyPipeline, dict[Size, tuple[int, ...]]]:
    """What the files say, of which a scheduler's table has data, and a latent's shape for each size. Networks are made
    on the way, without weights, which whoever counts tensors is not to see."""
    with _disable_current_modes():
        pipeline = open_pipeline(files)
        check_teacher(config, pipeline)
        return pipeline, {size: pipeline.latent_shape(size) for size in config.resolution}


def _vae(pipeline: AnyPipeline, dtype: torch.dtype, device: torch.device) -> Any:
    """None for a teacher of pixels."""
    if not pipeline.index.get("vae"):
        return None
    with torch.device(device), default_dtype(dtype):
        return freeze(pipeline.untrained("vae"))


class RandomImages:
    """Noise for images (see `tbcm.data.images.CaptionedImages`)."""

    def __init__(self, captions: Sequence[str]) -> None:
        self.captions = captions

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, indices: Sequence[int], size: Size) -> Tensor:
        return torch.rand(len(indices), 3, *size) * 2 - 1


class RandomLatents:
    """Noise for latents like those of `black` (see `tbcm.data.latents.CaptionedLatents`)."""

    def __init__(self, captions: Sequence[str], black: Mapping[Size, Tensor]) -> None:
        self.captions, self._black = captions, black

    def __len__(self) -> int:
        return len(self.captions)

    def latents(self, indices: Sequence[int], size: Size) -> tuple[Tensor, list[int]]:
        one = self._black[size]
        return torch.randn(len(indices), *one.shape, device=one.device), list(indices)
