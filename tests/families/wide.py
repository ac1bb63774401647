"""fp64 stays fp64: networks cast to fp32 inside, which finite differences cannot see through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NARROW = torch.float32, torch.bfloat16, torch.float16


class Wide(TorchFunctionMode):
    """Drops the casts of fp64 tensors to narrower floating-point types."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.dtype != torch.float64:
            return func(*args, **kwargs)
        if func is Tensor.float or (func is Tensor.type_as and args[1].dtype in _NARROW):
            return x
        if func is Tensor.to:
            args = x, *(self._wider(a) for a in args[1:])
            kwargs = {name: self._wider(a) for name, a in kwargs.items()}
            if any(isinstance(a, Tensor) and a.dtype in _NARROW for a in args[1:]):
                return x
        return func(*args, **kwargs)

    @staticmethod
    def _wider(a: Any) -> Any:
        return torch.float64 if isinstance(a, torch.dtype) and a in _NARROW else a
