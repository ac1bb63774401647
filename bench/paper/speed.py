"""Throughput and latency of the paper's Table 2, of a student and of the teacher, with `tbcm.evaluation.speed`."""

from __future__ import annotations

from pathlib import Path

from rows import Row
from tqdm import tqdm

from paper import recipes
from paper.icons import SPEED_BATCH, IconRunner
from paper.published import TABLES
from paper.trainings import Results, Run, runs_of

PAPER = {"teacher, 20 steps": (1.7, 0.9), "sCM, 1 step": (7.22, 0.21)}
PAPER |= dict.fromkeys(("Sana-Sprint, 1 step", "TBCM, 1 step"), PAPER["sCM, 1 step"])
NOTE = (
    f"Images/s in batches of {SPEED_BATCH} and seconds for one image, without text encoder and decoding, of one student"
    " (all are one network) and of the teacher, one after the other on this machine; medians of 10."
)


def measure(results: Results, runner: IconRunner, budget: int) -> None:
    found = {(row["arm"], row["sampling_steps"]) for row in results.rows() if row["metric"] == "latency"}
    lacking = [(run, steps) for run in _runs(budget) for steps in run.samplings if (run.arm.name, steps) not in found]
    for run, steps in tqdm(lacking, desc="speed", unit="sampler", disable=None):
        for metric, value in runner.speed(run, steps).items():
            results.add_row([2], run.arm.name, run.recipe, None, metric, value, sampling_steps=steps)


def cells(results: Results) -> dict[str, Row]:
    """Further cells of Table 2, by label of a row."""
    found = {(r["arm"], r["sampling_steps"], r["metric"]): r["value"] for r in results.rows() if r["seed"] is None}
    cells: dict[str, Row] = {}
    for line in TABLES[2][0].lines:
        net = "teacher" if line.arm == "teacher" else "untrained"
        paper = PAPER.get(line.label)
        cells[line.label] = {
            "images/s": found.get((net, line.steps, "throughput")),
            "s for one": found.get((net, line.steps, "latency")),
            "paper: images/s, s for one": f"{paper[0]}, {paper[1]}" if paper else None,
        }
    return cells


def _runs(budget: int) -> list[Run]:
    """The two networks, each with all its numbers of steps."""
    lines = TABLES[2][0].lines  # those of the tuned arms are the same networks
    networks = [(recipes.ARMS["teacher" if line.arm == "teacher" else "untrained"], line) for line in lines]
    return runs_of(((arm, line.steps, 2) for arm, line in networks), [0], budget, Path("unused"))
