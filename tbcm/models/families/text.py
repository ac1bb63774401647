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


def encoder_class(entry: Sequence[Any]) -> Any:
    """The class of a component that is one of transformers' networks, by its entry in model_index.json: of that
    library, or of a pipeline's own folder in diffusers. None for others."""
    import transformers  # which takes a second, and cached conditions need none of it

    library, name = (*entry, None, None)[:2]
    home = transformers if library == "transformers" else getattr(diffusers.pipelines, str(library), None)
    cls = getattr(home, str(name), None)
    return cls if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) else None


def encoders_of(
    location: str,
    index: Mapping[str, Any],
    family: Family,
    dtype: torch.dtype,
    device: torch.device,
    encoders: Mapping[str, nn.Module],
    **options: Any,
) -> Any:
    """The pipeline at `location` with these `encoders`, on their device; of its network and its autoencoder the
    configurations alone are read. `index` is its model_index.json, `options` go to from_pretrained."""
    hollow = {
        part: _hollow(location, part, index[part][1], options) for part in (family.network, "vae") if part in index
    }
    return execution_on(assembled(location, index, dtype, **hollow, **encoders, **options), device)


def assembled(location: str, index: Mapping[str, Any], dtype: torch.dtype, **given: Any) -> Any:
    """The pipeline at `location`, of components and other arguments that are given and the rest of that folder, but for
    what nothing here uses."""
    cls = getattr(diffusers, index["_class_name"])
    taken = inspect.signature(cls.__init__).parameters
    left_out: dict[str, Any] = {part: None for part in UNUSED if part in taken}
    if "requires_safety_checker" in taken:
        left_out["requires_safety_checker"] = False
    return cls.from_pretrained(location, torch_dtype=dtype, **left_out, **given)


def _hollow(location: str, part: str, name: str, options: Mapping[str, Any]) -> nn.Module:
    """Modules without memory."""
    cls = getattr(diffusers, name)
    revision = {"revision": options["revision"]} if "revision" in options else {}
    config = cls.load_config(location, subfolder=part, **revision)
    with torch.device("meta"):
        module: nn.Module = cls.from_config(config)
    return module
