"""Text conditions of encoders with random weights, which cost what real ones cost: for dry runs and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from tbcm.config import Config
from tbcm.config.resolution import Size
from tbcm.method.types import Condition
from tbcm.models.families.family import Family
from tbcm.models.families.pipeline import FamilyPipeline
from tbcm.models.families.text import RecordedConditions
from tbcm.models.loading import freeze
from tbcm.models.pipeline import Pipeline
from tbcm.models.sana.presets import GEMMA_2_2B, MINILM
from tbcm.models.text import hidden_states
from tbcm.samples.rollouts import Text, TextConditions
from tbcm.setup.precision import default_dtype, dtype_of, weights_dtype
from tbcm.setup.text import check_text_width, text_pipeline_of
from tbcm.training.accounting import SizesAlone

INSTRUCTION_TOKENS = 200
"""About what Sana's instruction adds to a prompt of Gemma tokens."""
LONG = 1200
"""Words of a prompt that is longer than any pipeline takes: text costs what the longest costs."""


def random_text(config: Config, pipeline: Pipeline | FamilyPipeline, device: torch.device) -> Text:
    """Without the encoders where text.cache names what has been encoded."""
    dtype, cached = dtype_of(config.text.precision, device), config.text.cache is not None
    if isinstance(pipeline, Pipeline):
        return TextConditions(RandomEncoder(config, pipeline, device), config.teacher.null_mask)
    with SizesAlone() if cached else nullcontext(), default_dtype(weights_dtype(dtype)), torch.device(device):
        encoders = {part: random_encoder(cls, part, pipeline) for part, cls in pipeline.encoder_classes.items()}
    with _disable_current_modes():
        pipe = pipeline.text_pipeline(encoders, dtype, device)
    return RandomConditions(pipe, pipeline.family, cached=cached)


def random_encoder(cls: Any, part: str, pipeline: FamilyPipeline) -> nn.Module:
    """An encoder of the configuration in a pipeline's folder."""
    stored = cls.config_class.from_pretrained(pipeline.location, subfolder=part, **pipeline.at_revision)
    return _answering(freeze(cls(stored)))


class RandomConditions(RecordedConditions):
    """What a pipeline tells its network of the longest prompts that it takes.

    The pipeline's own code runs on real tensors, since it looks at ids, masks and lengths; only its encoders may be
    without data. What it tells the network has no data either, but for those.

    Args:
        cached: the encoders are not the run's: they are used without being seen.
    """

    def __init__(self, pipe: Any, family: Family, *, cached: bool) -> None:
        super().__init__(pipe, family)
        self.cached = cached
        reads = any(isinstance(part, transformers.PreTrainedTokenizerBase) for part in pipe.components.values())
        self.prompt = " ".join([family.example] * LONG) if reads else family.example

    @property
    def modules(self) -> list[nn.Module]:
        return [] if self.cached else super().modules

    def _encoded(self, prompts: list[str], size: Size) -> tuple[Condition, Condition | None]:
        unseen = _disable_current_modes() if self.cached else nullcontext()
        with unset_fake_temporarily() as fake, unseen, _quiet():
            given, null = super()._encoded([self.prompt] * len(prompts), size)
        return (given, null) if fake is None else (_without_data(given), null and _without_data(null))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' warnings that a prompt is too long."""
    libraries = diffusers.utils.logging, transformers.utils.logging
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)


def _without_data(condition: Condition) -> Condition:
    def hollow(value: Tensor) -> Tensor:
        return torch.empty_like(value) if value.is_floating_point() else value

    return Condition({name: hollow(value) for name, value in condition.tensors.items()}, condition.static)


def _answering(model: nn.Module) -> nn.Module:
    """The same, where it has no data with zeros for its answers: what a pipeline does with them may ask for data."""
    fake = next(model.parameters())
    if not isinstance(fake, FakeTensor):
        return model
    forward = model.forward

    @wraps(forward)
    def answer(*args: Any, **kwargs: Any) -> Any:
        with fake.fake_mode:
            hollow = forward(*args, **kwargs)
        return tree_map_only(FakeTensor, lambda x: torch.zeros((), dtype=x.dtype).expand(x.shape), hollow)

    model.forward = answer
    return model


class RandomEncoder:
    """Sana's text encoder, of the configured kind, with random weights. With text.cache there is no `model`, and the
    states of all prompts are zero.

    Raises:
        UserError: an encoder whose states have another width than the teacher takes.
    """

    def __init__(self, config: Config, teacher: Pipeline, device: torch.device) -> None:
        self.dim: int = teacher.config("transformer")["caption_channels"]
        self.max_tokens, self.device = config.text.max_tokens, device
        self.instruction = INSTRUCTION_TOKENS if config.text.encoder == "gemma2" else 0
        self.model: nn.Module | None = None
        if config.text.cache is None:
            with torch.device(device), default_dtype(dtype_of(config.text.precision, device)):
                model = _sana_model(config)
            check_text_width(config, model.config.hidden_size, teacher)
            self.model = freeze(model)

    @torch.no_grad()
    def encode(self, prompts: list[str], *, instruct: bool = True) -> tuple[Tensor, Tensor]:
        length = self.max_tokens + (self.instruction if instruct else 0)
        mask = torch.ones(len(prompts), self.max_tokens, dtype=torch.bool, device=self.device)
        if self.model is None:
            return torch.zeros(*mask.shape, self.dim, device=self.device), mask
        ids = torch.zeros(len(prompts), length, dtype=torch.long, device=self.device)
        states = hidden_states(self.model, ids, torch.ones_like(ids, dtype=torch.bool))
        return states[:, : self.max_tokens].float(), mask


def _sana_model(config: Config) -> Any:
    """MiniLM, or Gemma as its folder says, where that is on this machine, else as Sana has it."""
    if config.text.encoder == "minilm":
        return transformers.BertModel(transformers.BertConfig(**MINILM))
    folder = Path(text_pipeline_of(config).location, "text_encoder")
    there = (folder / "config.json").is_file()
    stored = transformers.Gemma2Config.from_pretrained(folder) if there else transformers.Gemma2Config(**GEMMA_2_2B)
    return transformers.Gemma2Model(stored)
