"""The parts of a run with random weights, which cost what real ones cost: for dry runs and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor, nn

from tbcm.config import Config
from tbcm.config.resolution import Size
from tbcm.models.loading import freeze
from tbcm.models.pipeline import FLOW_STEPS
from tbcm.models.sana.network import SanaTrigFlow
from tbcm.models.sana.presets import AUTOENCODERS, GEMMA_2_2B, MINILM, SANA, compression
from tbcm.models.text import hidden_states
from tbcm.samples.noised import VaeLatents
from tbcm.samples.rollouts import TextConditions
from tbcm.setup.networks import build_student, files_of
from tbcm.setup.parts import Parts
from tbcm.setup.precision import dtype_of, switch, teacher_weights

INSTRUCTION_TOKENS = 200
"""About what Sana's instruction adds to a prompt of Gemma tokens."""


def random_parts(config: Config, device: torch.device) -> Parts:
    """The parts of a run with random weights: of `teacher.architecture`, or of the teacher's own configuration."""
    name = config.teacher.architecture
    if name is None:
        files = files_of(config)
        arguments, scale, factor = files.config("transformer"), files.timestep_scale, files.compression
    else:
        arguments = SANA[name]
        scale, factor = FLOW_STEPS * arguments["timestep_scale"], compression(name)
    with torch.device(device):
        with _default_dtype(teacher_weights(config, device)):
            backbone = SanaTransformer2DModel.from_config(arguments)
        teacher = SanaTrigFlow(
            backbone,
            timestep_scale=scale,
            differentiable=False,
            compiled=switch(config.teacher.compile, device),
            text_once=config.text.once,
        )
        freeze(teacher)
        black = {
            (height, width): torch.zeros(arguments["in_channels"], height // factor, width // factor)
            for height, width in config.resolution
        }
        encoder = RandomEncoder(config, arguments["caption_channels"], device)
    text = TextConditions(encoder, config.teacher.null_mask)
    prompts = [f"prompt {i}" for i in range(config.train.prompts_per_step)]
    student = build_student(config, teacher)
    if not config.method.from_images:
        return Parts(teacher, student, text, prompts, black)
    if config.data.latents is not None:
        return Parts(teacher, student, text, prompts, black, RandomLatents(prompts, black))
    vae = _random_vae(config, device)
    latents = VaeLatents(files_of(config), vae, RandomImages(prompts), device)
    return Parts(teacher, student, text, prompts, black, latents, vae)


def _random_vae(config: Config, device: torch.device) -> AutoencoderDC:
    name = config.teacher.architecture
    with torch.device(device), _default_dtype(dtype_of(config.teacher.precision, device)):
        if name is None:
            vae = AutoencoderDC.from_config(files_of(config).config("vae"))
        else:
            vae = AutoencoderDC(**AUTOENCODERS[name])
    return vae.eval().requires_grad_(False)


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


class RandomEncoder:
    """A text encoder of the configured kind with random weights: costs what the real one costs, says nothing. With
    text.cache there is no `model`, and the states of all prompts are zero."""

    def __init__(self, config: Config, dim: int, device: torch.device) -> None:
        self.dim, self.max_tokens, self.device = dim, config.text.max_tokens, device
        self.model: nn.Module | None = None
        if config.text.cache is None:
            with _default_dtype(dtype_of(config.text.precision, device)):
                self.model = _text_model(config.text.encoder)
            freeze(self.model)

    @torch.no_grad()
    def encode(self, prompts: list[str], *, instruct: bool = True) -> tuple[Tensor, Tensor]:
        length = self.max_tokens + (INSTRUCTION_TOKENS if instruct and self.dim == GEMMA_2_2B["hidden_size"] else 0)
        mask = torch.ones(len(prompts), self.max_tokens, dtype=torch.bool, device=self.device)
        if self.model is None:
            return torch.zeros(*mask.shape, self.dim, device=self.device), mask
        ids = torch.zeros(len(prompts), length, dtype=torch.long, device=self.device)
        states = hidden_states(self.model, ids, torch.ones_like(ids, dtype=torch.bool))
        return states[:, : self.max_tokens].float(), mask


def _text_model(name: str) -> nn.Module:
    from transformers import BertConfig, BertModel, Gemma2Config, Gemma2Model

    if name == "gemma2":
        return Gemma2Model(Gemma2Config(**GEMMA_2_2B))
    return BertModel(BertConfig(**MINILM))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside have weights of `dtype`: a conversion afterwards would cost memory that a run never needs."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)
