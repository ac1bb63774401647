"""The paper's Table 3: what a sample costs in each method, in time and in memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise

import memory
import torch
from rows import Row, table
from speed import arms
from speed.flops import count_into
from speed.measure import Measured, freed
from tqdm import tqdm

from paper import recipes
from paper.statistics import NOT_RESOLVED, REPRODUCED, REVERSED, paired, together, verdict
from paper.trainings import Results
from tbcm.config import Config
from tbcm.runtime.spread import spread

METHODS = ("sprint", "scm", "tbcm")
NAMES = {"sprint": "Sana-Sprint", "scm": "sCM", "tbcm": "TBCM"}
PAPER = {"sprint": (2.7, 72.0, 7680), "scm": (2.8, 62.9, 7965), "tbcm": (1.6, 22.6, 4640)}
"""GPU seconds a sample, GB, GPU hours."""
FASTEST_FIRST, LEANEST_FIRST = ("tbcm", "sprint", "scm"), ("tbcm", "scm", "sprint")
ROUNDS = 12
SANA = "sana-600m"
SANA_BATCH = 15  # one prompt with 16 points; the paper's 16 are no whole number of prompts


def measure(budget: int, results: Results, device: torch.device) -> None:
    """Measures and appends what is missing. Times are of steps in turns, in one process; memory is the allocator's on
    CUDA, else accounted as it would be there; of Sana-0.6B both are accounted only."""
    recipe_of = _recipe_of(budget)
    found = {(row["recipe"], row["metric"]) for row in results.rows()}
    configs = {name: recipes.config_of(recipes.ARMS[name], 0, budget) for name in METHODS}
    if any((recipe, "seconds_a_sample") not in found for recipe in recipe_of.values()):
        for name, seconds in _times(configs, device).items():
            results.add_row(
                [3], name, recipe_of[name], None, "seconds_a_sample", statistics.median(seconds), values=seconds
            )
    missing = [name for name in METHODS if (recipe_of[name], "peak_gib") not in found]
    for name in tqdm(missing, desc="memory", unit="method", disable=None):
        with freed(device):
            account = memory.measured if device.type == "cuda" else memory.accounted
            gib = account("fast", configs[name], device)["peak_gib"]
            counted = device.type != "cuda"
            results.add_row([3], name, recipe_of[name], None, "peak_gib", gib, accounted=counted)
    for name in tqdm(METHODS, desc=SANA, unit="method", disable=None):
        if (SANA, f"{name}_gib") not in found:
            config = arms.config(SANA, "published", name, SANA_BATCH, 16, torch.device("cuda"))
            with freed(device):
                gib = memory.accounted("published", config, torch.device("cpu"))["peak_gib"]
                tflop = count_into(config) / 1e12 / SANA_BATCH
            results.add_row([3], name, SANA, None, f"{name}_tflop", tflop, model=SANA, accounted=True)
            results.add_row([3], name, SANA, None, f"{name}_gib", gib, model=SANA, accounted=True)


def _times(configs: dict[str, Config], device: torch.device) -> dict[str, list[float]]:
    """Seconds a sample, a value a round."""
    ready = {name: Measured("fast", config, device) for name, config in configs.items()}
    for one in ready.values():
        one.warm_up()
    for _ in tqdm(range(ROUNDS), desc="steps in turns", unit="round", disable=None):
        for one in ready.values():
            one.step()
    return {name: [s / one.trainer.method.samples_per_step for s in one.seconds] for name, one in ready.items()}


def markdown(budget: int, results: Results) -> str:
    recipe_of, found = _recipe_of(budget), {(row["recipe"], row["metric"]): row for row in results.rows()}
    times = {name: found.get((recipe_of[name], "seconds_a_sample")) for name in METHODS}
    gib = {name: found.get((recipe_of[name], "peak_gib")) for name in METHODS}
    if not all(times.values()) or not all(gib.values()):
        return "### Table 3: what a sample costs\n\nNot measured yet."
    of_sana = {name: [found.get((SANA, f"{name}_{what}")) for what in ("tflop", "gib")] for name in METHODS}
    rows = [_row(name, budget, times, gib, of_sana, found[recipe_of[name], "peak_gib"]) for name in METHODS]
    headings = {
        "method": "method",
        "ms": "ms a sample",
        "time": "ratio to sCM",
        "samples": "samples",
        "minutes": "minutes in all",
        "gib": "peak GiB",
        "memory": "ratio to sCM ",
        "sana_tflop": "Sana-0.6B: TFLOP a sample",
        "sana_gib": "Sana-0.6B: peak GiB",
        "paper": "paper: s a sample, GB, GPU hours",
    }
    shown = {key: name for key, name in headings.items() if any(row.get(key) is not None for row in rows)}
    decided = _verdicts({k: v for k, v in times.items() if v}, {k: v["value"] for k, v in gib.items() if v})
    return "\n\n".join(
        [
            "### Table 3: what a sample costs",
            table(rows, shown),
            f"Icons, with the published settings of Table 2: {ROUNDS} steps of each method in turns, in one process, on"
            " random weights; medians, and the ratio's median with the 20 % and 80 % quantiles over rounds. On a CPU"
            " memory is accounted: the live tensors of an eager step in a GPU's precision, teacher, text encoder and"
            " VAE among them. Sana-0.6B: accounted, our re-implementation of the published way at 1024 px,"
            f" {SANA_BATCH} samples a step; in brackets, there and for the paper, the ratio to sCM.",
            *decided,
        ]
    )


def _row(
    name: str,
    budget: int,
    times: dict[str, Row | None],
    gib: dict[str, Row | None],
    of_sana: dict[str, list[Row | None]],
    own: Row,
) -> Row:
    here, base = times[name], times["scm"]
    assert here and base and gib["scm"]
    ratio, low, high = spread([a / b for a, b in zip(here["values"], base["values"], strict=True)])
    row: Row = {
        "method": NAMES[name],
        "ms": 1000 * here["value"],
        "time": f"{ratio:.2f} ({low:.2f} to {high:.2f})",
        "samples": budget,
        "minutes": here["value"] * budget / 60,
        "gib": own["value"],
        "memory": own["value"] / gib["scm"]["value"],
        "paper": "{} ({:.2f}), {} ({:.2f}), {} ({:.2f})".format(
            *(x for mine, scm in zip(PAPER[name], PAPER["scm"], strict=True) for x in (mine, mine / scm))
        ),
    }
    for key, mine, scm in zip(("sana_tflop", "sana_gib"), of_sana[name], of_sana["scm"], strict=True):
        if mine and scm:
            row[key] = f"{mine['value']:.3g} ({mine['value'] / scm['value']:.2f})"
    return row


def _verdicts(times: dict[str, Row], gib: dict[str, float]) -> list[str]:
    values = {name: dict(enumerate(row["values"])) for name, row in times.items()}
    by_time = [
        (better, worse, verdict(paired(values[better], values[worse]), lower_is_better=True))
        for better, worse in _pairs(FASTEST_FIRST)
    ]
    by_memory = [(better, worse, _exactly(gib[better], gib[worse])) for better, worse in _pairs(LEANEST_FIRST)]
    return [
        f"The paper's order by {what}: **{together([each for *_, each in pairs])}** ("
        + "; ".join(f"{NAMES[better]} before {NAMES[worse]}: {each}" for better, worse, each in pairs)
        + ")."
        for what, pairs in (("time a sample", by_time), ("memory", by_memory))
    ]


def _pairs(order: Sequence[str]) -> list[tuple[str, str]]:
    return list(pairwise(order))


def _exactly(better: float, worse: float) -> str:
    """What is counted has no spread."""
    return REPRODUCED if better < worse else REVERSED if better > worse else NOT_RESOLVED


def _recipe_of(budget: int) -> dict[str, str]:
    chosen = (recipes.ARMS[name] for name in METHODS)
    return {arm.name: recipes.recipe(arm, recipes.config_of(arm, 0, budget)) for arm in chosen}
