from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tbcm.errors import UserError
from tbcm.runtime.profiling import StepProfiler

CPU = torch.device("cpu")
PLUGIN_FILE = re.compile(r"^(.*?)(\.\d+)?\.pt\.trace\.json(?:\.gz)?$")
"""The file names that torch-tb-profiler reads (`consts.py`): a worker and a span."""


def train_step(layer: nn.Linear, device: torch.device = CPU) -> None:
    layer(torch.ones(6, 4, device=device)).tanh().sum().backward()


def traces(folder: Path) -> list[Path]:
    return sorted((folder / "profile").iterdir())


def events(trace: Path) -> list[dict[str, Any]]:
    return json.loads(trace.read_text())["traceEvents"]


def steps_of(trace: Path) -> list[str]:
    names = [event["name"] for event in events(trace) if event.get("cat") == "user_annotation"]
    return [name for name in names if name.startswith("ProfilerStep#")]


def test_a_chosen_step_leaves_a_trace(tmp_path: Path) -> None:
    layer, profiler = nn.Linear(4, 8), StepProfiler(tmp_path, [1], CPU)
    for number in range(3):
        with profiler.step(number):
            train_step(layer)
    (trace,) = traces(tmp_path)
    worker, span = PLUGIN_FILE.match(trace.name).groups()  # type: ignore[union-attr]
    assert worker.endswith(f"_{os.getpid()}")
    assert span is not None
    assert steps_of(trace) == ["ProfilerStep#1"]
    operators = {event["name"]: event for event in events(trace) if event.get("cat") == "cpu_op"}
    assert {"aten::addmm", "aten::tanh", "aten::tanh_backward"} <= set(operators)
    assert [6, 4] in operators["aten::addmm"]["args"]["Input Dims"]
    assert any(event["name"] == "[memory]" for event in events(trace))


def test_consecutive_steps_are_spans_of_one_worker(tmp_path: Path) -> None:
    layer, profiler = nn.Linear(4, 8), StepProfiler(tmp_path, [4, 5], CPU)
    for number in range(3, 7):
        with profiler.step(number):
            train_step(layer)
    assert [steps_of(trace) for trace in traces(tmp_path)] == [["ProfilerStep#4"], ["ProfilerStep#5"]]
    assert len({PLUGIN_FILE.match(trace.name)[1] for trace in traces(tmp_path)}) == 1  # type: ignore[index]


def test_other_steps_write_nothing(tmp_path: Path) -> None:
    layer = nn.Linear(4, 8)
    for chosen in ([], [7]):
        profiler = StepProfiler(tmp_path / "run", chosen, CPU)
        for number in range(3):
            with profiler.step(number):
                assert not torch.autograd._profiler_enabled()
                train_step(layer)
    assert not (tmp_path / "run").exists()


def test_a_step_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path, [0, 1], CPU)
    with pytest.raises(KeyboardInterrupt), profiler.step(0):
        raise KeyboardInterrupt
    with profiler.step(1):
        train_step(nn.Linear(4, 8))
    (trace,) = traces(tmp_path)
    assert steps_of(trace) == ["ProfilerStep#1"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("")
    with pytest.raises(UserError, match="cannot write"), StepProfiler(tmp_path, [0], CPU).step(0):
        pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_of_the_step_and_of_no_other(tmp_path: Path) -> None:
    device = torch.device("cuda")
    layer, profiler = nn.Linear(4, 8, device=device), StepProfiler(tmp_path, [1], device)
    for number in range(3):
        with profiler.step(number):
            train_step(layer, device)
            if number == 1:
                torch.ones(1, device=device).erfinv_()
            else:
                torch.ones(1, device=device).lgamma_()
    (trace,) = traces(tmp_path)
    kernels = " ".join(event["name"] for event in events(trace) if event.get("cat") == "kernel")
    assert "erfinv" in kernels
    assert "lgamma" not in kernels
