"""Counting what a step costs: the FLOPs of its operators and the bytes of its live tensors."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


class CostCounter(TorchDispatchMode):
    """Counts, from the moment it is entered: `flops` (2 per multiply-add of matrix products, convolutions and
    attention), `live` bytes of tensor storage, and their `peak`.

    Works on fake and meta tensors, which have sizes but no memory. Workspaces inside an operator and an allocator's
    fragmentation are not counted. (PyTorch's own FlopCounterMode fails under torch.func.jvp without gradients and
    overcounts the backward pass of grouped convolutions, so this is a plain dispatch mode over its formulas.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.live = 0
        self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet == aten.convolution_backward:
            self.flops += _convolution_backward(*args)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def forget(_: Any) -> None:
            del self._seen[key]
            self.live -= size

        self._seen[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> int:
    """As much as the forward pass for each of the gradients of input and weight that is wanted."""
    forward = 2 * math.prod(grad.shape) * math.prod(weight.shape[1:])
    return forward * sum(rest[-1][:2])
