"""CUDA graphs: a function of tensors is captured once per shape and replayed without the cost of its launches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tbcm.errors import UserError

logger = logging.getLogger(__name__)

Tensors = Mapping[str, Tensor]

WARM_UP_CALLS = 3
"""Before a capture, as PyTorch advises: compiling, autotuning and library set-up must be over by then."""


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    outputs: tuple[Tensor, ...]


class Graphed:
    """`fn` of named tensors, replayed on the current stream from a CUDA graph. No gradient flows through it.

        graphed = Graphed(fn, switch="teacher.cuda_graph=false")
        (y,) = graphed({"x": x})

    The first call with new names, shapes, dtypes or autocast settings captures a graph. The results are the caller's: a
    later call does not change them. Where the tensors are not on a GPU, `fn` is simply called.

    `fn` may read nothing back from the device, and only its inputs and tensors that stay where they are: weights may
    change in place. Its Python code does not run again. Not for several threads at once.

    Args:
        switch: the setting that turns the graph off, for the message of a capture that fails.
        limit: how many graphs are kept; calls of further kinds run without one.
    """

    def __init__(self, fn: Callable[[Tensors], tuple[Tensor, ...]], *, switch: str, limit: int = 8) -> None:
        self.fn, self.switch, self.limit = fn, switch, limit
        self._graphs: dict[Hashable, _Captured] = {}
        self._warned = False
        self._pool: Any = None  # PyTorch's token for memory that graphs share
        self._stream: torch.cuda.Stream | None = None
        self._last: torch.cuda.Event | None = None

    @torch.no_grad()
    def __call__(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """Raises UserError where `fn` cannot be captured."""
        device = next(iter(tensors.values())).device
        captured = self._captured(tensors, device) if device.type == "cuda" else None
        if captured is None:
            return self.fn(tensors)
        stream = torch.cuda.current_stream(device)
        if self._last is not None:  # on another stream, perhaps; all graphs use the same memory
            stream.wait_event(self._last)
        for name, buffer in captured.inputs.items():
            buffer.copy_(tensors[name], non_blocking=True)
        captured.graph.replay()
        outputs = tuple(output.clone() for output in captured.outputs)
        self._last = stream.record_event(self._last)
        return outputs

    def _captured(self, tensors: Tensors, device: torch.device) -> _Captured | None:
        key = _kind(tensors)
        if key not in self._graphs:
            if len(self._graphs) >= self.limit:
                if not self._warned:
                    logger.warning("%d CUDA graphs are captured: inputs of other shapes run without one", self.limit)
                self._warned = True
                return None
            self._graphs[key] = self._capture(tensors, device)
            shapes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in sorted(tensors))
            logger.info("CUDA graph %d of at most %d: %s", len(self._graphs), self.limit, shapes)
        return self._graphs[key]

    def _capture(self, tensors: Tensors, device: torch.device) -> _Captured:
        if self._stream is None:  # one pool and one stream for all graphs, so that they share their memory
            self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        inputs = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
        graph, caller = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream), _no_cast_cache():
            for _ in range(WARM_UP_CALLS):
                self.fn(inputs)
            try:
                # thread_local: what other threads ask of CUDA meanwhile (NCCL's watchdog, say) is no error here.
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    outputs = self.fn(inputs)
            except RuntimeError as error:
                # Ending a broken capture raises too, and hides what broke it.
                reason = str(error.__context__ or error).partition("\n")[0]
                raise UserError(f"capturing a CUDA graph failed ({reason}): set {self.switch}") from error
        caller.wait_stream(self._stream)
        return _Captured(graph, inputs, outputs)


def _kind(tensors: Tensors) -> Hashable:
    """What a graph is captured for."""
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    return autocast, *((name, tensors[name].shape, tensors[name].dtype) for name in sorted(tensors))


def _no_cast_cache() -> torch.autocast:
    """The autocast settings in force, but without its cache of weights: a cast that was made before the capture would
    be missing from the graph, which would then not see the weight change."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False)
