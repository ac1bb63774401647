"""A student over many ranks: replicated (DistributedDataParallel) or sharded (FSDP2, over all ranks or within groups).

Both average gradients over ranks, so that each rank's loss is its share of the global mean times the number of ranks.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from tbcm.errors import UserError
from tbcm.runtime import distributed

Mode = Literal["ddp", "fsdp"]


def parallelize(
    net: nn.Module, blocks: Iterable[nn.Module], mode: Mode, shard: int | None, device: torch.device
) -> nn.Module:
    """`net` as what is to be called in training; one rank's is `net` itself.

    All ranks get rank 0's weights. With fsdp every parameter of `net` that is trained becomes a DTensor in place, and
    `net` and each of `blocks` gather theirs while they run; gradients and what an optimiser makes of them stay sharded.
    Frozen ones stay whole on every rank: they are a teacher's.

    Args:
        shard: fsdp: over how many consecutive ranks weights are sharded (see `shard_size`); beyond, groups hold the
            same (HSDP).

    Raises:
        UserError: `shard` does not divide the number of ranks.
    """
    if distributed.world_size() == 1:
        return net
    if mode == "ddp":
        # Looking for unused parameters, of which there are none (as it warns), keeps DDP from laying out its buckets
        # anew after the first step: it would add up gradients in another order than then, and than a resumed run.
        ids = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            net, device_ids=ids, gradient_as_bucket_view=True, find_unused_parameters=True
        )
    for tensor in (*net.parameters(), *net.buffers()):
        dist.broadcast(tensor.detach(), 0)
    # The warning is for who changes a network's answer in place, which nobody here does.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(.*\) returned a view")
    mesh = device_mesh(device.type, shard_size(shard))
    frozen = {parameter for parameter in net.parameters() if not parameter.requires_grad}
    for module in (*blocks, net):
        fully_shard(module, mesh=mesh, ignored_params=frozen)
    return net


def shard_size(shard: int | None) -> int:
    """None: the ranks of this node, whose GPUs exchange weights fastest."""
    world = distributed.world_size()
    size = shard or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if world % size:
        raise UserError(f"parallel.shard = {size}: should divide the number of ranks, {world}")
    return size


def device_mesh(device_type: str, shard: int) -> DeviceMesh:
    """[shard], or [replicate, shard] where there are more ranks."""
    world = distributed.world_size()
    if shard == world:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (world // shard, shard), mesh_dim_names=("replicate", "shard"))


def is_sharded(net: nn.Module) -> bool:
    return isinstance(net, FSDPModule)


def forget_gathered(net: nn.Module) -> None:
    """After a forward pass FSDP keeps the whole of what is in no block, for a backward pass: without one, and before
    the weights change, it is to be dropped."""
    if isinstance(net, FSDPModule):
        net.reshard()


def accumulating(net: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Around one of a step's micro-batches, backward included: only the `last` exchanges gradients."""
    if isinstance(net, FSDPModule):
        net.set_requires_gradient_sync(last)
    elif isinstance(net, nn.parallel.DistributedDataParallel) and not last:
        return net.no_sync()
    return contextlib.nullcontext()
