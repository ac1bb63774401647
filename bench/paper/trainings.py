"""Doing the runs that tables ask for, each once, and keeping what was measured of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rows import Row, append
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from paper import recipes
from paper.recipes import Arm
from tbcm.config import Config
from tbcm.errors import UserError
from tbcm.runtime.lock import RunLock

logger = logging.getLogger("tbcm.bench")
FLOOR = "floor"


@dataclass(frozen=True)
class Run:
    """An arm with a seed, to be sampled in each of `samplings` steps for `tables`."""

    arm: Arm
    seed: int
    config: Config
    recipe: str
    samplings: tuple[int, ...]
    tables: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"


Wanted = tuple[Arm, int, int | None]  # sampled in so many steps, for this table


def runs_of(wanted: Iterable[Wanted], seeds: Sequence[int], budget: int, folder: Path) -> list[Run]:
    """The runs that `wanted` needs, each once: all of the first seed, of the second, ..."""
    by_recipe: dict[str, list[Wanted]] = {}
    for each in wanted:
        by_recipe.setdefault(recipes.recipe(each[0], recipes.config_of(each[0], 0, budget)), []).append(each)

    def run(seed: int, recipe: str) -> Run:
        arm = by_recipe[recipe][0][0]
        steps = sorted({steps for _, steps, _ in by_recipe[recipe]})
        tables = sorted({table for *_, table in by_recipe[recipe] if table is not None})
        config = recipes.config_of(arm, seed, budget, folder / f"{recipe}-seed{seed}" / "run")
        return Run(arm, seed, config, recipe, tuple(steps), tuple(tables))

    return [run(seed, recipe) for seed in seeds for recipe in by_recipe]


class Results:
    """The rows of a bench: a row a figure, `row` = (recipe, seed, steps of sampling, images, metric).

    A GPU's and a CPU's are never mixed: their generators draw other numbers from a seed, and their times have nothing
    in common.
    """

    def __init__(self, bench: str, folder: Path, images: int, device: torch.device) -> None:
        self.bench, self.folder, self.images, self.device = bench, folder, images, device.type

    def rows(self) -> list[Row]:
        """Of this kind of device and this number of images (or of none); a figure that was written twice counts as
        written last."""
        last = {
            (row["recipe"], row["seed"], row["sampling_steps"], row["metric"]): row
            for row in self._all()
            if row.get("images") in (None, self.images)
        }
        return list(last.values())

    def image_counts(self) -> list[int]:
        """Numbers of images that anything was measured on."""
        return sorted({row["images"] for row in self._all() if row.get("images")})

    def missing(self, run: Run) -> list[int]:
        """Steps of sampling that are not measured yet."""
        done = {
            row["sampling_steps"]
            for row in self.rows()
            if (row["recipe"], row["seed"], row["metric"]) == (run.recipe, run.seed, "evaluate_seconds")
        }
        return [steps for steps in run.samplings if steps not in done]

    def add_training(self, run: Run, seconds: float) -> None:
        self._add(run, None, None, {"train_seconds": seconds}, config=recipes.stated(run.config))

    def add(self, run: Run, steps: int, figures: dict[str, float]) -> None:
        """`evaluate_seconds` is written last: with it the others are whole."""
        seconds = figures.pop("evaluate_seconds")
        self._add(run, steps, self.images, {**figures, "evaluate_seconds": seconds})

    def add_floor(self, figures: dict[str, float]) -> None:
        for metric, value in figures.items():
            self.add_row([], FLOOR, FLOOR, None, metric, value, images=self.images)

    def floor(self) -> dict[str, float]:
        return {row["metric"]: row["value"] for row in self.rows() if row["recipe"] == FLOOR}

    def _all(self) -> list[Row]:
        path = self.folder / f"{self.bench}.jsonl"
        if not path.is_file():
            return []
        with path.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        return [row for row in rows if row["device"] == self.device]

    def _add(self, run: Run, steps: int | None, images: int | None, figures: dict[str, float], **more: Any) -> None:
        if run.arm.trained:
            more |= {"samples": recipes.samples(run.config), "training_steps": run.config.train.steps}
        for metric, value in figures.items():
            self.add_row(
                run.tables,
                run.arm.name,
                run.recipe,
                run.seed,
                metric,
                value,
                sampling_steps=steps,
                images=images,
                **more,
            )

    def add_row(
        self, tables: Sequence[int], arm: str, recipe: str, seed: int | None, metric: str, value: float, **more: Any
    ) -> None:
        """One figure. `more`: sampling_steps, images and what else is to be told of it."""
        row: Row = {"table": list(tables), "row": arm, "arm": arm, "model": "icons", "recipe": recipe, "seed": seed}
        row |= {"shape": [3, 64, 64], "device": self.device, "sampling_steps": None, "images": None}
        row |= {"metric": metric, "value": value, **more}
        append(self.bench, row, self.folder)


class Runner(Protocol):
    def train(self, run: Run) -> float:
        """Trains it, or the rest of it. Returns the seconds of the whole training."""

    def measure(self, run: Run, steps: int) -> dict[str, float]:
        """Figures of its samples, `evaluate_seconds` among them."""

    @property
    def floor(self) -> dict[str, float]:
        """What to read the figures beside."""


def do(runs: Sequence[Run], results: Results, runner: Runner) -> list[str]:
    """What of `runs` has no results yet. Returns what was left out and why: runs that another process is at, and runs
    that failed (the others are done all the same)."""
    left = [run for run in runs if results.missing(run)]
    problems = []
    with (
        tqdm(total=len(left), desc="runs", unit="run", disable=None) as bar,
        logging_redirect_tqdm([logging.getLogger("tbcm")]),
    ):
        for run in left:
            bar.set_postfix_str(run.name)
            lock = RunLock(Path(run.config.out).parent)
            try:
                lock.acquire()
            except UserError as held:
                problems.append(f"{run.name}: {held}")
                continue
            try:
                _do(run, results, runner)
            except UserError as error:
                logger.error("%s: %s", run.name, error)
                problems.append(f"{run.name}: {error}")
            finally:
                lock.release()
            bar.update()
    return problems


def _do(run: Run, results: Results, runner: Runner) -> None:
    missing = results.missing(run)  # another process may have been at it since
    if missing and run.arm.trained:
        results.add_training(run, runner.train(run))
    for steps in missing:
        figures = runner.measure(run, steps)
        results.add(run, steps, figures)
        logger.info("%s, sampled in %d steps: KID x 1e3 %.2f", run.name, steps, figures["kid"])
    if missing and not results.floor():
        results.add_floor(runner.floor)
