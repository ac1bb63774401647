"""What a rank holds in memory from step to step, by kind, whole or sharded."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

import torch
from torch import Tensor, nn

from tbcm.training.methods.method import Beside
from tbcm.training.trainer import Trainer

SHARDED = "student", "gradients", "optimizer", "average", "fake", "fake's gradients", "fake's optimizer"
"""What FSDP divides among ranks."""


def holdings(trainer: Trainer) -> dict[str, int]:
    """Bytes of the frozen networks (teacher, text encoder, VAE), of the student but for what it shares with the
    teacher, and of what belongs to its trained weights; and the same of what a method holds beside."""
    shared = {id(tensor) for tensor in tensors(trainer.teacher)}
    return {
        "teacher": _bytes(tensors(trainer.teacher)),
        "text encoder": _bytes(tensor for part in trainer.text.modules for tensor in tensors(part)),
        "VAE": _bytes(tensors(trainer.parts.vae)),
        "student": _own(trainer.student, shared),
        "gradients": _bytes(trainer.parameters),
        "optimizer": _of_optimizer(trainer.optimizer),
        "average": _bytes(trainer.ema.shadow.values()),
        **_of_all(trainer.method.beside, shared),
    }


def _of_all(beside: Mapping[str, Beside], shared: Container[int]) -> dict[str, int]:
    """Of each its weights and buffers and, if it is trained, its gradients and its optimiser's state."""
    found = {}
    for name, each in beside.items():
        found[name] = _own(each.net, shared)
        if each.optimizer is not None:
            found[f"{name}'s gradients"] = _bytes(trained(each.net))
            found[f"{name}'s optimizer"] = _of_optimizer(each.optimizer)
    return found


def _own(net: nn.Module, shared: Container[int]) -> int:
    """Of a network without the tensors `shared`, by id."""
    return _bytes(tensor for tensor in tensors(net) if id(tensor) not in shared)


def _of_optimizer(optimizer: torch.optim.Optimizer) -> int:
    state = optimizer.state_dict()["state"].values()
    return _bytes(value for of_one in state for value in of_one.values() if isinstance(value, Tensor))


def on_a_rank(whole: Mapping[str, int], shard: int, *, accumulates: bool) -> dict[str, int]:
    """Of `holdings`, a rank's share where `shard` ranks divide a student. Gradients stay whole in a step of several
    micro-batches: they are exchanged after the last."""
    kept_whole = ("gradients", "fake's gradients") if accumulates else ()
    return {
        name: -(-size // shard) if name in SHARDED and name not in kept_whole else size for name, size in whole.items()
    }


def gathered(net: nn.Module, blocks: Iterable[nn.Module]) -> int:
    """Bytes of weights that FSDP has gathered at its peak: of what is in no block, and of two blocks (the one that runs
    and the next)."""
    sizes = sorted((_bytes(trained(block)) for block in blocks), reverse=True)
    return _bytes(trained(net)) - sum(sizes) + sum(sizes[:2])


def trained(net: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def tensors(net: nn.Module | None) -> Iterable[Tensor]:
    return () if net is None else (*net.parameters(), *net.buffers())


def _bytes(some: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in some)
