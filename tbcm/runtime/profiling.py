"""Traces of chosen training steps, for TensorBoard."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tbcm.runtime.files import atomic_path

logger = logging.getLogger(__name__)


class StepProfiler:
    """Records chosen steps: operators with their shapes, memory and, on a GPU, kernels.

        profiler = StepProfiler("out/run1", [20, 21], device)
        with profiler.step(number):
            train_step()

    Each chosen step is a trace of its own, `profile/HOST_PROCESS.NANOSECONDS.pt.trace.json`: the names that
    TensorBoard's profiler plugin (torch-tb-profiler) looks for, so that `tensorboard --logdir out/run1` shows each
    process as a worker and each of its steps as a span. Perfetto and chrome://tracing open the files too. A step that
    is not chosen costs nothing, one that raises leaves no trace.
    """

    def __init__(self, folder: str | os.PathLike[str], steps: Collection[int], device: torch.device) -> None:
        self.folder, self.steps, self.device = Path(folder) / "profile", frozenset(steps), device
        self.activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self.activities.append(ProfilerActivity.CUDA)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Records what runs inside, to the end of it on the device, if `number` is chosen.

        Raises:
            UserError: the trace cannot be written.
        """
        if number not in self.steps:
            yield
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the step before may still be running
        with (
            profile(activities=self.activities, record_shapes=True, profile_memory=True) as trace,
            record_function(f"ProfilerStep#{number}"),  # how the plugin recognises a step
        ):
            yield
        path = self.folder / f"{socket.gethostname()}_{os.getpid()}.{time.time_ns()}.pt.trace.json"
        with atomic_path(path) as part:
            trace.export_chrome_trace(str(part))
        logger.info("profile of step %d: %s", number, path)
