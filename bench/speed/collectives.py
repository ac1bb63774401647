"""What ranks send one another in a step: collectives counted as they happen, and what a ring sends for each.

Bytes are those that each rank sends, and receives, if the collective goes round a ring: they follow from the tensors'
sizes and are not measured on the wire. NCCL takes other ways too (trees, reduction in the switch), which send somewhat
other amounts. The factors are nccl-tests': https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_FACTORS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "broadcast": 1}
KINDS = tuple(_FACTORS)
_OPERATORS = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "broadcast_": "broadcast",
}
_MOVE_NOTHING = "wait_tensor", "_wrap_tensor_autograd", "barrier"


class Traffic(NamedTuple):
    """Of one kind of collective: how many a rank takes part in, and the bytes that it sends."""

    calls: int = 0
    bytes: float = 0.0

    def plus(self, other: Traffic) -> Traffic:
        return Traffic(self.calls + other.calls, self.bytes + other.bytes)


def ring_bytes(kind: str, size: float, ranks: int) -> float:
    """`size`: bytes of the whole, that is of what is reduced or broadcast, or of all that is gathered. (Of a broadcast,
    the mean of the ranks: the last one sends nothing.)"""
    return _FACTORS[kind] * size * (ranks - 1) / ranks


class Collectives(TorchDispatchMode):
    """Counts the collectives of c10d that happen inside, also those of DistributedDataParallel and FSDP2 and of their
    backward passes, in `traffic` by kind.

    Raises:
        NotImplementedError: one of another kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.traffic: dict[str, Traffic] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # first its operators on the shards, and the collectives between them
        result = operator(*args, **(kwargs or {}))
        if operator.namespace in ("c10d", "_c10d_functional") and operator._opname not in _MOVE_NOTHING:
            self._count(operator._opname, args, result)
        return result

    def _count(self, name: str, args: Any, result: Any) -> None:
        kind = _OPERATORS.get(name)
        if kind is None:
            raise NotImplementedError(f"collective {name}: its bytes are not known here")
        size = max(_bytes(value) for value in (*args, result))
        sent = Traffic(1, ring_bytes(kind, size, _group_size(args)))
        self.traffic[kind] = self.traffic.get(kind, Traffic()).plus(sent)


def _bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _group_size(args: Any) -> int:
    """c10d's operators take a process group and other objects of C++; functional ones end with the group's name."""
    for value in args:
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return int(dist.ProcessGroup.unbox(value).size())
    return int(_resolve_process_group(args[-1]).size())
