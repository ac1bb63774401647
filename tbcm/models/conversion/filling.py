"""A model of a configuration, and exactly the tensors that it wants."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tbcm.errors import UserError
from tbcm.models.conversion.renaming import Converted
from tbcm.models.weights import check_fit


def fill(model: nn.Module, converted: Converted, dtype: torch.dtype | None, where: str) -> None:
    """Gives `model`, which is on the meta device, the tensors, in `dtype` (None: their own).

    Raises:
        UserError: some are missing, not the model's or of another shape; quantised; or of 8 bits without a `dtype`.
    """
    own, tensors = model.state_dict(), dict(converted.tensors)
    for names in _tied(model):
        given = next((tensors[name] for name in names if name in tensors), None)
        tensors |= {} if given is None else {name: tensors.get(name, given) for name in names}
    info: dict[str, Any] = {
        "missing_keys": [key for key in own if key not in tensors],
        "unexpected_keys": [*(key for key in tensors if key not in own), *converted.unknown],
        "mismatched_keys": [
            (key, value.shape, own[key].shape)
            for key, value in tensors.items()
            if key in own and value.shape != own[key].shape
        ],
    }
    check_fit(model, info, where, "--like should be a pipeline of the same architecture")
    tensors = {key: value for key, value in tensors.items() if key in own}
    for key, value in tensors.items():
        if own[key].is_floating_point() and not value.is_floating_point():
            raise UserError(f"{where}: {key} holds whole numbers: quantised weights are not supported")
        if dtype is None and value.is_floating_point() and value.dtype.itemsize < 2:
            raise UserError(f"{where}: {key} has 8 bits ({value.dtype}): give --dtype bf16 to have 16")
    model.load_state_dict(tensors, assign=True)
    if dtype is not None:
        model.to(dtype=dtype)


def _tied(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one and the same."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return [names for names in found.values() if len(names) > 1]
