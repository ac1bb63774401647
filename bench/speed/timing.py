"""Time of a function on the device: the median of repeats, with a cold cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tbcm.runtime.spread import Spread, spread


class Clock:
    """Times functions on a device, all in the same way.

    On CUDA a function is captured as a graph and replayed, so that what is timed is the device's work and not Python's;
    before each replay a buffer larger than the L2 cache is overwritten. All of it happens inside `on_a_stream`: a
    backward pass runs on the stream of its forward pass, and the default one cannot be captured.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self._flush = torch.empty(2**28 if device.type == "cuda" else 0, dtype=torch.int8, device=device)

    def __call__(self, function: Callable[[], Any]) -> Spread:
        """Milliseconds."""
        times = self._on_cuda(function) if self.device.type == "cuda" else self._on_cpu(function)
        return spread(times)

    def on_a_stream(self) -> AbstractContextManager[object]:
        """Inside, work goes to a stream of its own."""
        return torch.cuda.stream(torch.cuda.Stream(self.device)) if self.device.type == "cuda" else nullcontext()

    def _on_cuda(self, function: Callable[[], Any]) -> list[float]:
        for _ in range(3):  # compiles, fills caches
            function()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(self.device)):
            kept = function()  # its results must outlive the capture
        marks = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(self.repeats)]
        for start, end in marks:
            self._flush.zero_()
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize(self.device)
        del kept
        return [start.elapsed_time(end) for start, end in marks]

    def _on_cpu(self, function: Callable[[], Any]) -> list[float]:
        function()
        times = []
        for _ in range(self.repeats):
            started = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - started))
        return times


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s of a large square product: the best of twelve."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best / 1e12
