"""The few collectives that a run needs. Without an initialised process group each is its single-process meaning."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tbcm.errors import UserError
from tbcm.runtime.ranks import Ranks
from tbcm.runtime.signs import pulse

logger = logging.getLogger(__name__)

T = TypeVar("T")


def pick_device(device_type: str | None = None) -> torch.device:
    """ "cuda" or "cpu"; None takes CUDA where there is one.

    Raises:
        UserError: CUDA is asked for and there is none.
    """
    if device_type == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here (torch.cuda.is_available() is False): leave --device out")
    return torch.device(device_type or ("cuda" if torch.cuda.is_available() else "cpu"))


def init(device_type: str | None = None, timeout: timedelta | None = None) -> torch.device:
    """Joins the process group that torchrun's environment describes, and returns this rank's device.

    Without torchrun (no `WORLD_SIZE` in the environment) there is no group and this only picks the device. CUDA
    tensors go over nccl, CPU tensors and Python objects over gloo, so that agreeing on an object costs no device sync.

    Args:
        device_type: "cuda" or "cpu"; None takes CUDA where there is one.

    Raises:
        UserError: more processes on this node than GPUs.
    """
    cuda = pick_device(device_type).type == "cuda"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this node has no GPU: torch sees {torch.cuda.device_count()}; "
            "start at most that many with --nproc_per_node"
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        store, rank, world = next(dist.rendezvous("env://"))
        dist.init_process_group(
            backend,
            store=_of_this_attempt(store),
            rank=rank,
            world_size=world,
            timeout=timeout,
            device_id=device if cuda else None,
        )
    return device


def _of_this_attempt(store: dist.Store) -> dist.Store:
    """`store` without what ranks left in it that torchrun has restarted: their addresses, which nobody answers to.

    The store is the agent's and outlives them. Agents of several nodes count restarts each for itself, so that a count
    cannot tell attempts apart there; without a shared store each attempt makes its own.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        return dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and int(os.environ.get("RANK", 0)) == 0:
        logger.warning(
            "torchrun's agents share a store, and restarts on several nodes fail in it: start every agent with"
            " TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
        )
    return store


def shutdown() -> None:
    """Leaves the process group, if there is one. Whatever communicates by itself (DistributedDataParallel, FSDP) must
    be out of use: were it the last to hold the group, it would free it under Python's lock and wait there for gloo's
    threads, which wait for the lock."""
    if is_initialized():
        gc.collect()
        dist.destroy_process_group()


def is_restart() -> bool:
    """Whether torchrun (--max-restarts) has started processes in place of ones that failed; every rank calls it, as
    only the agents that made a restart have counted it."""
    return any_rank(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0)


_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process takes itself for the only one: for what a rank works out for itself."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def is_initialized() -> bool:
    return not _alone and dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if is_initialized():
        with pulse.waiting():
            dist.barrier()


def local_slice(n: int) -> slice:
    """This rank's contiguous share of `n` global prompts.

    Raises:
        UserError: `n` cannot be shared equally.
    """
    if n % world_size():
        raise UserError(f"{n} prompts a step cannot be shared by {world_size()} ranks: make it a multiple of that")
    share = n // world_size()
    return slice(rank() * share, (rank() + 1) * share)


def local_slices(n: int, at_once: int | None) -> list[slice]:
    """`local_slice(n)` in parts of at most `at_once` prompts (None: in one)."""
    share = local_slice(n)
    size = at_once or share.stop - share.start
    return [slice(start, min(start + size, share.stop)) for start in range(share.start, share.stop, size)]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, in place; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over ranks of a tensor, in one collective; stays on the device."""
    if not is_initialized():
        return values
    total = values.clone()
    with pulse.waiting():
        dist.all_reduce(total)
    return total


def all_true(flag: Tensor) -> Tensor:
    """Whether a bool scalar on the device is true on every rank; stays on the device."""
    if not is_initialized():
        return flag
    smallest = flag.to(torch.int32)
    with pulse.waiting():
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return smallest.bool()


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank (a signal may reach one rank a step before another). Blocks the host only."""
    if not is_initialized():
        return flag
    count = torch.tensor(int(flag))
    with pulse.waiting():
        dist.all_reduce(count)
    return bool(count)


def everyone(group: dist.ProcessGroup | None = None) -> Ranks:
    """All ranks, over `group` (default: the training's own)."""
    return Ranks(rank(), world_size(), group)


def run_on_main(function: Callable[[], T]) -> T:
    """Calls `function` on rank 0 and returns its result, or raises its error, on every rank (`Ranks.on_main`)."""
    return everyone().on_main(function)
