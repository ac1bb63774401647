"""The next rollout beside the student's work: small teacher batches leave a GPU partly idle, and this fills it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from tbcm.samples.rollouts import Batch, SampleSource


class Overlapped:
    """`source` one batch ahead: each batch is enqueued on a stream of its own before the one before it is handed out.

    The batches are those of `source`; a batch more is in memory at a time. On a CPU, which has no streams, the work is
    merely done earlier.
    """

    def __init__(self, source: SampleSource, device: torch.device) -> None:
        self.source = source
        self.batches, self.samples_per_prompt = source.batches, source.samples_per_prompt
        self.first_point = source.first_point
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._following: int | None = None
        self._ahead: Iterator[Batch] = iter(())
        self._ready: Batch | None = None

    def __call__(self, step: int) -> Iterator[Batch]:
        if step != self._following:
            if self._stream is not None:  # what was enqueued before (weights, the null prompt) is to be there first
                self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            self._ahead = self._from(step)
            self._ready = self._produce()
        self._following = None  # until this step has been handed out whole
        for _ in range(self.batches):
            assert self._ready is not None
            batch = self._received(self._ready)
            self._ready = self._produce()
            yield batch
        self._following = step + 1

    def _from(self, step: int) -> Iterator[Batch]:
        while True:
            yield from self.source(step)
            step += 1

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _produce(self) -> Batch:
        with self._on_stream():
            return next(self._ahead)

    def _received(self, batch: Batch) -> Batch:
        """Ready for the current stream, whose use of the memory the allocator is told of."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            for tensor in _tensors(batch):
                tensor.record_stream(current)
        return batch


def _tensors(batch: Batch) -> list[Tensor]:
    path = batch.trajectory
    return [path.x, path.dxdt, path.t, path.x0, path.guidance, batch.keep, *batch.condition.tensors.values()]
