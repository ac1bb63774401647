"""Writing checkpoints while the training goes on."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from tbcm.errors import UserError, first_line
from tbcm.runtime import checkpoint_files as files
from tbcm.runtime import distributed
from tbcm.runtime.distributed import local
from tbcm.runtime.files import atomic_folder
from tbcm.runtime.leftovers import remove_leftovers
from tbcm.runtime.ranks import Ranks, explain_lost_ranks
from tbcm.runtime.write_errors import remedy

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Saves a run's checkpoints in RUN/checkpoints (`checkpoint` says what they are made of).

    `save` returns once the tensors are copied to host memory; a thread writes the copies, hashes the files, makes the
    checkpoint appear in one step and deletes those not to be kept. One save is in flight at most: the next one waits
    for it, and raises its error if it failed. A kill at any moment leaves whole checkpoints only.

    Where any tensor is a `DTensor` (FSDP2, HSDP), every rank copies and writes its own shards, and each replica is
    written once. Else the ranks hold the same (DDP), and rank 0 alone copies and writes: a copy on every rank of a node
    would fill its memory. The copies' memory is kept for the next save, on CUDA as pinned pages.

    Every rank makes the writer, at the same point, and calls `save` and `wait` alike. `close` it before the process
    group goes; a process that ends without first lets its thread end, which takes `timeout` at most if others are gone.

    Args:
        folder: the run's.
        keep_last: how many of the newest checkpoints stay (>= 1).
        keep_every: those whose step is a multiple of it stay too.
        asynchronous: else `save` writes from the tensors themselves, without a copy, and returns when all is done.
        timeout: how long ranks wait for one another's part of an asynchronous save. It must be enough to write one.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        asynchronous: bool = True,
        timeout: timedelta = timedelta(minutes=10),
    ) -> None:
        self.saved: tuple[int, Path] | None = None
        """Step and path of the newest checkpoint known to be whole; who resumes a run sets it."""
        self._root = Path(folder) / "checkpoints"
        self._keep_last, self._keep_every = keep_last, keep_every
        self._asynchronous = asynchronous
        self._flight: _Flight | None = None
        self._copy = HostCopy()
        # A group of its own: collectives of two threads on one group would be paired at random.
        own_group = asynchronous and distributed.world_size() > 1
        self._ranks = distributed.everyone(dist.new_group(backend="gloo", timeout=timeout) if own_group else None)
        self._thread = ThreadPoolExecutor(1, "checkpoint", _use_device, (_current_device(),))

    def save(self, step: int, state: dict[str, Any], config: dict[str, Any]) -> None:
        """Begins to write step-`step`.

        Args:
            step: number of updates done.
            state: by name, objects with `state_dict` (modules, optimisers, EMA) or nested dictionaries of tensors,
                numbers and strings.
            config: what the run was started with (JSON types); kept in the manifest for people and for who loads it.

        Raises:
            UserError: the save before failed (this one is then not begun), or this one if not asynchronous. Earlier
                checkpoints are untouched.
        """
        self.wait()
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # here: filters are no thread's own
        config = json.loads(json.dumps(config))  # as a reader will see it: keys are strings, tuples are lists
        state = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in state.items()}
        sharded = self._ranks.world > 1 and any(isinstance(leaf, DTensor) for leaf in tree_leaves(state))
        target = self._root / files.name_of(step)
        writing: Future[None] | None = None
        if sharded or self._ranks.is_main:
            write = partial(self._write, step, target, self._copy(state) if self._asynchronous else state, config)
            run = self._thread.submit if self._asynchronous else _run_now
            writing = run(partial(write, self._ranks if sharded else Ranks()))
        self._flight = _Flight(step, target, sharded, writing)
        if not self._asynchronous:
            self.wait()

    @property
    def failed(self) -> bool:
        """Whether this rank knows already that the save in flight has failed; `wait` says why."""
        writing = self._flight.writing if self._flight else None
        return writing is not None and writing.done() and writing.exception() is not None

    def wait(self) -> None:
        """Until the save in flight, if any, is whole.

        Raises:
            UserError: it failed, on whichever rank; every rank raises it. Earlier checkpoints are untouched.
        """
        if self._flight is None:
            return
        flight, self._flight = self._flight, None
        if flight.sharded:
            flight.result()  # the ranks' threads have agreed on it
        else:
            self._ranks.on_main(flight.result)
        self.saved = flight.step, flight.path

    def close(self) -> None:
        """Lets this rank's part of the save in flight end, for a run that fails: asks no other rank, and only logs."""
        flight, self._flight = self._flight, None
        if flight and flight.writing and (error := flight.writing.exception()):
            logger.error("%s was not saved: %s", flight.path, error)

    def _write(self, step: int, target: Path, state: dict[str, Any], config: dict[str, Any], ranks: Ranks) -> None:
        """On the thread. `ranks`: those who write, this one among them."""
        with ExitStack() as stack:

            def begin() -> Path:
                remove_leftovers(self._root)
                return stack.enter_context(atomic_folder(target))

            def finish() -> None:
                entries = {name: entry for share in shares for name, entry in share.items()}
                world = {"ranks": self._ranks.world, "sharded": ranks.world > 1}
                files.write_manifest(part, step, config, entries, **world)
                stack.close()

            part = ranks.on_main(begin)
            _write_tensors(part, target, state, ranks)
            shares = ranks.on_each(lambda: files.describe_files(part, ranks.rank))
            ranks.on_main(finish)
        ranks.on_main(lambda: files.prune(self._root, step, self._keep_last, self._keep_every))


@dataclass(frozen=True)
class _Flight:
    step: int
    path: Path
    sharded: bool
    writing: Future[None] | None  # None: this rank writes nothing

    def result(self) -> None:
        if self.writing:
            self.writing.result()


class HostCopy:
    """Copies a nested state's tensors to host memory, into the same buffers each time: a copy is good until the next.

    CPU tensors are copied too, shards stay shards. (torch's own `DefaultStager` can be used once only on torch 2.11.)
    """

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, state: dict[str, Any]) -> dict[str, Any]:
        leaves, structure = tree_flatten(state)
        copies = [self._copy(place, leaf) if isinstance(leaf, Tensor) else leaf for place, leaf in enumerate(leaves)]
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        copied: dict[str, Any] = tree_unflatten(copies, structure)
        return copied

    def _copy(self, place: int, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(place)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = self._buffers[place] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        local(buffer).copy_(local(tensor), non_blocking=True)
        return buffer


def _write_tensors(part: Path, target: Path, state: dict[str, Any], ranks: Ranks) -> None:
    writer = dcp.FileSystemWriter(part)
    try:
        with explain_lost_ranks():
            dcp.save(state, storage_writer=writer, process_group=ranks.group, no_dist=ranks.world == 1)
    except CheckpointException as error:
        causes = [failure for failure, _ in error.failures.values()]
        # Another rank's exception arrives without the OSError that caused it; its text is all there is.
        advice = next(filter(None, map(remedy, causes)), f"{first_failure(error)}; is the disk full?")
        raise UserError(f"cannot write {target}: {advice} (earlier checkpoints are untouched)") from error


def first_failure(error: CheckpointException) -> str:
    return first_line(next(iter(error.failures.values()))[0])


def _run_now(work: Callable[[], None]) -> Future[None]:
    done: Future[None] = Future()
    try:
        work()
        done.set_result(None)
    except Exception as error:
        done.set_exception(error)
    return done


def _current_device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def _use_device(index: int | None) -> None:
    """A thread starts with GPU 0, and would take memory there."""
    if index is not None:
        torch.cuda.set_device(index)
