"""Prompts -> Condition for any family: the pipeline's own text encoders, without its network and its autoencoder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from torch import nn

from tbcm.config.resolution import Size, shown_size
from tbcm.errors import UserError, first_line
from tbcm.method.types import Condition
from tbcm.models.families.family import Family
from tbcm.models.families.recording import execution_on

UNUSED = "safety_checker", "feature_extractor", "image_encoder"


class RecordedConditions:
    """What a pipeline tells its network of prompts, on the pipeline's device (see `tbcm.samples.rollouts.Text`).

    Args:
        pipe: the pipeline, as `encoders_of` loads it.
    """

    null_mask = "own"

    def __init__(self, pipe: Any, family: Family) -> None:
        self.pipe, self.family = pipe, family

    @property
    def example(self) -> str:
        """A prompt that the pipeline takes."""
        return self.family.example

    @property
    def modules(self) -> list[nn.Module]:
        parts = [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]
        return [part for part in parts if not any(p.is_meta for p in part.parameters())]

    def __call__(self, prompts: Sequence[str], size: Size) -> Condition:
        return self._encoded(list(prompts), size)[0]

    def null_prompt(self, size: Size) -> Condition | None:
        """Of the unconditional branch, for one prompt; None for a network without one."""
        return self._encoded([self.family.example], size)[1]

    def _encoded(self, prompts: list[str], size: Size) -> tuple[Condition, Condition | None]:
        """Raises UserError where the pipeline refuses a size, or a prompt."""
        try:
            return self.family.encode(self.pipe, prompts, **self.family.sized_call(size))
        except ValueError as error:
            refused = f"{self.family.pipeline} refuses this for resolution = {shown_size(size)}"
            raise UserError(f"{refused}: {first_line(error)}") from None


def encoders_of(
    location: str,
    index: Mapping[str, Any],
    family: Family,
    dtype: torch.dtype,
    device: torch.device,
    made: Mapping[str, nn.Module] | None = None,
    **options: Any,
) -> Any:
    """The pipeline at `location` with all its weights but the network's and the autoencoder's, whose configurations
    alone are read; `index` is its model_index.json, `made` are components that are there already, `options` go to
    from_pretrained."""
    given = dict(made or {})
    for part in (family.network, "vae"):
        if part in index:
            given[part] = _hollow(location, part, index[part][1], options)
    cls = getattr(diffusers, index["_class_name"])
    taken = inspect.signature(cls.__init__).parameters
    left_out: dict[str, Any] = {part: None for part in UNUSED if part in taken}
    if "requires_safety_checker" in taken:
        left_out["requires_safety_checker"] = False
    pipe = cls.from_pretrained(location, torch_dtype=dtype, **given, **left_out, **options)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name not in given:
            part.to(device).eval().requires_grad_(False)
    return execution_on(pipe, device)


def _hollow(location: str, part: str, name: str, options: Mapping[str, Any]) -> nn.Module:
    """Modules without memory."""
    cls = getattr(diffusers, name)
    revision = {"revision": options["revision"]} if "revision" in options else {}
    config = cls.load_config(location, subfolder=part, **revision)
    with torch.device("meta"):
        module: nn.Module = cls.from_config(config)
    return module
