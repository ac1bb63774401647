"""Quality against throughput, from evaluation reports (paper Fig. 1, middle, and Tab. 2)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tbcm.errors import UserError
from tbcm.figures import style
from tbcm.figures.style import Drawing
from tbcm.figures.subject import Request

_COLOURS = (style.BLUE, style.RED, style.GREEN, style.ORANGE, style.PURPLE, style.GREY)
_MARKERS = "osD^vP"


@dataclass(frozen=True)
class Point:
    """One arm: images/s, its quality (FID, or 1e3 KID; lower is better), and which report it is of."""

    label: str
    steps: int
    throughput: float
    quality: float


def read_reports(paths: Sequence[str]) -> tuple[str, list[Point]]:
    """The measure that all have ("fid", else "kid") and a point for each row of the reports.

    A report is a JSON file (or a folder with a report.json): a mapping with `results`, a list of rows, or a row; a row
    has `steps`, `throughput` and `fid` or `kid`. The label is a row's or the report's `label`, else its source's path.
    Rows without speed or quality are left out.

    Raises UserError where a file is no report, the reports have nothing in common to draw, or two say that they were
    made otherwise: with other prompts, on another device.
    """
    if not paths:
        raise UserError("fid-throughput: give reports of tbcm.evaluate (report.json) after the name")
    reports = {path: _read(path) for path in map(Path, paths)}
    _require_alike(reports)
    rows = [row for path, report in reports.items() for row in _rows(path, report)]
    for measure in ("fid", "kid"):
        if all(_number(row, measure) is not None for row in rows):
            return measure, [
                Point(str(row["label"]), int(row["steps"]), float(row["throughput"]), float(row[measure]))
                for row in rows
            ]
    raise UserError(
        "fid-throughput: the reports have neither fid nor kid in all their rows, so there is no common axis"
    )


def _read(path: Path) -> Any:
    path = path / "report.json" if path.is_dir() else path
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the report: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a JSON report: {error}") from None


def _require_alike(reports: Mapping[Path, Any]) -> None:
    """In all that two of them say."""
    said: dict[str, tuple[Path, object]] = {}
    for path, report in reports.items():
        for what, value in _circumstances(report).items():
            first, other = said.setdefault(what, (path, value))
            if value != other:
                raise UserError(
                    f"fid-throughput: {first} and {path} differ in {what} ({other} and {value}), so they cannot share"
                    " an axis: evaluate both in the same way"
                )


def _circumstances(report: Any) -> dict[str, object]:
    """What quality and throughput depend on beside the sampler; nothing for what a report does not say."""
    if not isinstance(report, dict):
        return {}
    options, facts = report.get("options") or {}, report.get("facts") or {}
    found = {what: report.get(what) for what in ("images", "prompts", "network", "reference")}
    found |= {"batch": options.get("batch"), "device": facts.get("device")}
    return {what: value for what, value in found.items() if value is not None}


def _rows(path: Path, report: Any) -> list[dict[str, Any]]:
    head = report if isinstance(report, dict) else {}
    rows = head.get("results", [report]) if head else report
    source = head.get("source")
    folder = path if path.is_dir() else path.parent
    label = head.get("label") or (source.get("path") if isinstance(source, dict) else source) or folder.name
    if (head.get("options") or {}).get("teacher"):
        label = f"{label}, teacher"
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: not a report of tbcm.evaluate: no list of results")
    whole = [{"label": label} | row for row in rows if _drawable(row)]
    if not whole:
        raise UserError(f"{path}: no row has steps, throughput and fid or kid; evaluate both distance and speed")
    return whole


def _drawable(row: dict[str, Any]) -> bool:
    quality = _number(row, "fid") is not None or _number(row, "kid") is not None
    throughput, steps = _number(row, "throughput"), _number(row, "steps")
    return quality and steps is not None and throughput is not None and throughput > 0


def _number(row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def make(request: Request) -> Drawing:
    measure, points = read_reports(request.sources)
    figure = style.page(660)
    axes = style.panel(figure, 120, 60, style.WIDTH - 160, 500)
    labels = list(dict.fromkeys(point.label for point in points))
    for k, label in enumerate(labels):
        own = sorted((point for point in points if point.label == label), key=lambda point: point.throughput)
        x, y = [point.throughput for point in own], [point.quality for point in own]
        colour, marker = _COLOURS[k % len(_COLOURS)], _MARKERS[k % len(_MARKERS)]
        axes.plot(x, y, color=colour, marker=marker, markersize=8, linewidth=1, label=label)
        for point in own:
            axes.annotate(
                f"{point.steps}", (point.throughput, point.quality), (7, 7), textcoords="offset points", color=colour
            )
    axes.set_xscale("log")
    for axis_ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis_ticks("{x:g}")
    axes.margins(0.1)
    axes.set(
        xlabel="throughput, images per second",
        ylabel={"fid": "FID", "kid": "1000 KID"}[measure] + " (lower is better)",
    )
    style.legend_above(axes, min(3, len(labels)))

    best = min(points, key=lambda point: point.quality)
    fastest = max(points, key=lambda point: point.throughput)
    caption = (
        f"{measure.upper()} against throughput (paper Fig. 1, middle), as reported; the number at a point is its steps."
        f" Best: {best.label} in {best.steps} ({best.quality:.3g} at {best.throughput:.3g} images/s); fastest:"
        f" {fastest.label} in {fastest.steps} ({fastest.quality:.3g} at {fastest.throughput:.3g} images/s)."
    )
    return Drawing(figure, {"measure": measure, "points": [asdict(point) for point in points]}, caption)
