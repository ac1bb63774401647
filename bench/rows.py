"""Rows of measurements: JSON lines in bench/results, and Markdown tables of them."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tbcm.runtime.commit import commit

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def append(bench: str, row: Mapping[str, Any], folder: Path) -> Row:
    """Adds machine, versions, commit and date, and appends the row to `folder`/`bench`.jsonl."""
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ")
    complete = {"bench": bench, **row, **facts(), "date": date}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{bench}.jsonl").open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(complete) + "\n")
    return complete


@cache
def facts() -> Row:
    """Where a row was measured, and by which code."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": f"{_cpu()} ({torch.get_num_threads()} threads)",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": commit(".", ":(exclude)bench/results"),
    }


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A Markdown table of `columns`, key -> heading; a figure that was not measured is a dash."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
