"""The tensors of a single file: of safetensors, or of torch.save, from which nothing but tensors is ever read."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct  # what arrays are pickled by
from safetensors.torch import load_file
from torch import Tensor

from tbcm.errors import UserError
from tbcm.models.conversion.renaming import Tensors
from tbcm.models.weights import readable

_PICKLED = ".pth", ".pt", ".ckpt", ".bin"
_LAST, _AVERAGED = "state_dict", "state_dict_ema"
"""Where NVlabs' trainer (diffusion/utils/checkpoint.py) keeps the weights, as Lightning does, and their average."""
_NUMPY: list[Any] = [
    *((_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
]
"""Of numpy's random state, which that trainer keeps beside them."""


def read_tensors(file: Path, *, averaged: bool = False) -> Tensors:
    """By name, on the CPU, in the file's own dtypes; `averaged`: of both that a training saved, the average.

    Raises:
        UserError: no such file, of another kind, damaged, with more than tensors in it, or without an average.
    """
    tree: Any = _read(file)
    if averaged and not (isinstance(tree, Mapping) and isinstance(tree.get(_AVERAGED), Mapping)):
        raise UserError(f"{file}: holds no averaged weights ({_AVERAGED}): leave --ema out")
    if averaged:
        tree = tree[_AVERAGED]
    while isinstance(tree, Mapping) and isinstance(tree.get(_LAST), Mapping):
        tree = tree[_LAST]
    found = {str(k): v for k, v in tree.items() if isinstance(v, Tensor)} if isinstance(tree, Mapping) else {}
    if not found:
        raise UserError(f"{file}: no checkpoint: there are no tensors in it, by name or under {_LAST!r}")
    return found


def _read(file: Path) -> Any:
    with readable(file):
        if file.suffix == ".safetensors":
            return load_file(file)
        if file.suffix not in _PICKLED:
            raise UserError(f"{file}: should be a .safetensors file, or {', '.join(_PICKLED)}")
        with torch.serialization.safe_globals(_NUMPY):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
