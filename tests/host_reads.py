"""What of a training step waits for the device."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

VALUES = "_local_scalar_dense", "is_nonzero", "equal"
"""Operators that give a value to the host: what `.item()`, `.tolist()`, `bool()` and `float()` of a tensor call."""
SHAPES = "nonzero", "nonzero_numpy", "argwhere", "masked_select", "_unique", "_unique2", "unique_dim", "bincount"
"""Operators whose results have a shape that depends on values."""


class HostReads(TorchDispatchMode):
    """Lists, as (what, stack), all operators on CUDA tensors that wait for the device, and copies between host and
    device that are not asynchronous.

    To be entered inside a FakeTensorMode. It answers in the device's place where it can, so that the step goes on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in VALUES and args[0].is_cuda:
            self._note(name)
            return _answer(name, args[0].dtype)
        if (name in SHAPES or _by_mask(name, args)) and args[0].is_cuda:
            self._note(name)
        out = func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            self._copied(name, args[0 if name == "_to_copy" else 1], out, _asynchronous(name, args, kwargs))
        return out

    def _copied(self, name: str, source: Tensor, out: Tensor, asynchronous: bool) -> None:
        pair = source.device.type, out.device.type
        if pair == ("cuda", "cpu") or (pair == ("cpu", "cuda") and not asynchronous):
            self._note(f"{name} from {pair[0]} to {pair[1]} of {tuple(source.shape)}")

    def _note(self, what: str) -> None:
        self.reads.append((what, "".join(traceback.format_stack(limit=14)[:-2])))


def _answer(name: str, dtype: torch.dtype) -> bool | int | float:
    if name != "_local_scalar_dense" or dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _by_mask(name: str, args: Any) -> bool:
    """Indexing by booleans asks how many of them are true, except to fill in one value."""
    fills = name.startswith("index_put") and args[2].numel() == 1
    masks = args[1] if name == "index" or name.startswith(("index_put", "_index_put")) else ()
    return not fills and any(isinstance(mask, Tensor) and mask.dtype in (torch.bool, torch.uint8) for mask in masks)


def _asynchronous(name: str, args: Any, kwargs: Any) -> bool:
    return bool(kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,)))
