"""What a run says: a progress bar, metrics.jsonl, TensorBoard, pictures, and messages that leave the bar whole."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tbcm.errors import UserError
from tbcm.runtime import distributed
from tbcm.runtime.failure import file_logger
from tbcm.runtime.files import atomic_path
from tbcm.runtime.write_errors import explain_os_errors

logger = logging.getLogger("tbcm")


def setup_logging(level: int = logging.INFO) -> None:
    """Sends tbcm's messages to stderr: all of them on rank 0, warnings on other ranks, with the rank in front."""
    name = "" if distributed.is_main() else f"[rank {distributed.rank()}] "
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(logging.Formatter(f"%(asctime)s {name}%(levelname)s %(message)s", "%H:%M:%S"))
    console.setLevel(level if distributed.is_main() else logging.WARNING)
    for handler in [*logger.handlers, *file_logger.handlers]:
        handler.close()
    logger.handlers[:], file_logger.handlers[:] = [console], [logging.NullHandler()]
    logger.propagate = False
    for each in (logger, file_logger):
        each.setLevel(level)


def log_to_file(folder: str | os.PathLike[str]) -> None:
    """From here on every rank also appends all its messages, with date and host, to FOLDER/logs/rank-00003.log.

    Call it after `setup_logging`, and once the folder is known to be this run's.

    Raises:
        UserError: the file cannot be written.
    """
    rank, host = distributed.rank(), socket.gethostname()
    path = Path(folder) / "logs" / f"rank-{rank:05d}.log"
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Names of files may be any bytes.
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} ({host}) %(levelname)s %(message)s"))
    logger.addHandler(handler)
    file_logger.addHandler(handler)
    file_logger.info("process %d begins, as rank %d of %d: %s", os.getpid(), rank, distributed.world_size(), sys.argv)


class MetricLog:
    """Metrics of one run, written by rank 0 only (elsewhere every method does nothing).

        with MetricLog("out/run1", total_steps=20_000) as log:
            log.log(step, {"loss": loss})       # loss may be a tensor on the device
            log.advance()

    `step` counts the updates done, as a checkpoint's name does. On resuming at `start_step` k, rows after k, which the
    earlier process wrote after its last checkpoint, are cut off.

    Where stderr is no terminal (a batch system's log), each logged step is one plain line in place of the bar.

    Args:
        shown: the metrics that the bar or the line shows.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        total_steps: int,
        *,
        is_main: bool = True,
        start_step: int = 0,
        shown: Sequence[str] = ("loss", "grad_norm"),
    ) -> None:
        self.is_main = is_main
        if not is_main:
            return
        from torch.utils.tensorboard import SummaryWriter  # seconds to import: only where it is used

        self.folder = Path(folder)
        self.total_steps = total_steps
        self.shown = shown
        self._path = self.folder / "metrics.jsonl"
        _cut(self._path, start_step)
        self._stack = ExitStack()
        with explain_os_errors(self._path):
            self._file = self._stack.enter_context(self._path.open("a", buffering=1, encoding="utf-8"))
            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start_step + 1)
        self._stack.callback(self._board.close)
        self._bar = self._stack.enter_context(
            tqdm(total=total_steps, initial=start_step, unit="step", disable=None, dynamic_ncols=True)
        )
        self._stack.enter_context(logging_redirect_tqdm([logger]))
        self._last = (start_step, time.monotonic())

    def log(self, step: int, metrics: Mapping[str, float | Tensor]) -> None:
        """Writes one row. Scalar tensors are fetched in one transfer a device: a log step's only host sync.

        JSON has no NaN or infinity: they are written as the strings "nan", "inf" and "-inf".
        """
        if not self.is_main:
            return
        numbers = _to_floats(metrics)
        row = {"step": step, "time": round(time.time(), 3)}
        row |= {key: value if math.isfinite(value) else str(value) for key, value in numbers.items()}  # type: ignore
        with explain_os_errors(self._path):
            self._file.write(json.dumps(row) + "\n")
        for key, value in numbers.items():
            self._board.add_scalar(key, value, step)
        figures = {key: f"{numbers[key]:.4g}" for key in self.shown if key in numbers}
        if self._bar.disable:
            self._log_line(step, figures)
        else:
            self._bar.set_postfix(figures)

    def advance(self, steps: int = 1) -> None:
        """Moves the bar. Touches no device."""
        if self.is_main:
            self._bar.update(steps)

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        """Keeps a picture as `images/TAG-STEP.png` and in TensorBoard."""
        if not self.is_main:
            return
        with atomic_path(self.folder / "images" / f"{tag}-{step:08d}.png") as part:
            image.save(part)
        self._board.add_image(tag, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        if self.is_main:
            self._stack.close()

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _log_line(self, step: int, figures: dict[str, str]) -> None:
        (last_step, last_time), now = self._last, time.monotonic()
        self._last = (step, now)
        text = " ".join(f"{key} {value}" for key, value in figures.items())
        if step > last_step:
            seconds = (now - last_time) / (step - last_step)
            left = tqdm.format_interval(seconds * (self.total_steps - step))
            text += f" ({seconds:.3g} s/step, {left} left)"
        logger.info("step %d/%d %s", step, self.total_steps, text)


def _to_floats(metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Python numbers, in the order given; one device-to-host transfer for all tensors of a device together."""
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for key, value in metrics.items():
        if isinstance(value, Tensor):
            by_device.setdefault(value.device, {})[key] = value.detach().float()
    fetched: dict[str, float] = {}
    for tensors in by_device.values():
        fetched |= zip(tensors, torch.stack(list(tensors.values())).tolist(), strict=True)
    return {key: fetched[key] if key in fetched else float(value) for key, value in metrics.items()}


def _cut(path: Path, start_step: int) -> None:
    """Drops the rows after `start_step`, and a last line that a killed process left unfinished."""
    if not os.path.lexists(path):
        with explain_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{path} cannot be read ({reason}): mend it or move it away") from None
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    kept = [line for number, line in enumerate(lines, 1) if _step_of(line, path, number) <= start_step]
    with atomic_path(path) as part:
        part.write_text("".join(kept), encoding="utf-8")


def _step_of(line: str, path: Path, number: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} line {number} is not a row of metrics: mend it or move the file away") from None
