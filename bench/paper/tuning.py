"""Tuning: the same variations of each method's arm of the tables, at the same cost, on seeds that no table reports."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rows import Row, table

from paper import recipes
from paper.recipes import ARMS, Arm
from paper.report import METRICS, cell
from tbcm.config import Config

FIRST_SEED = 100
METHODS = ("tbcm", "scm", "sprint")


def grid(method: str) -> list[Arm]:
    """The arm of the tables, then one thing changed at a time: learning rate, samples a step (steps follow), width of
    the weights' average, each down and up."""
    base = ARMS[method]
    config = recipes.base_of(base)
    lr, prompts, ema = config.optimizer.lr, config.train.prompts_per_step, config.ema
    variations: list[tuple[str, tuple[str, ...]]] = [
        ("lr / 3", (f"optimizer.lr={lr / 3:.3g}",)),
        ("lr x 3", (f"optimizer.lr={lr * 3:.3g}",)),
        ("batch / 2", (f"train.prompts_per_step={max(1, prompts // 2)}",)),
        ("batch x 2", (f"train.prompts_per_step={prompts * 2}",)),
    ]
    for label, by in (("EMA / 3", 1 / 3), ("EMA x 3", 3.0)):
        if ema.kind == "power":
            change = [f"ema.sigma_rel={min(0.27, ema.sigma_rel * by):.3g}"]
        else:
            change = [f"ema.halflife_steps={ema.halflife_steps * by:.4g}"]
            if ema.ramp_up:
                change.append(f"ema.ramp_up={ema.ramp_up * by:.3g}")
        variations.append((label, tuple(change)))
    return [_arm(method, "recipe", ()), *(_arm(method, label, change) for label, change in variations)]


def attempt(method: str, change: Sequence[str]) -> Arm:
    """Overrides of one's own."""
    return _arm(method, " ".join(change), tuple(change))


def _arm(method: str, label: str, change: tuple[str, ...]) -> Arm:
    return Arm(f"{method}: {label}", label, ARMS[method].config, change)


def markdown(rows: Sequence[Row], method: str, images: int) -> str | None:
    """All that was tried of a method, the best KID first: of each number of samples a run by itself. None if nothing
    was measured on so many images."""
    configs = {
        row["recipe"]: Config.model_validate({"out": "unused", **row["config"]})
        for row in rows
        if row["metric"] == "train_seconds"
    }
    figures: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    about: dict[str, Row] = {}
    for row in rows:
        if row["arm"].startswith(f"{method}: ") and row["sampling_steps"] == 1:
            figures[row["recipe"]][row["metric"]][row["seed"]] = row["value"]
            about[row["recipe"]] = row
    lines: list[Row] = []
    for recipe, row in about.items():
        config, kid = configs[recipe], figures[recipe]["kid"]
        lines.append(
            {
                "tried": row["row"].removeprefix(f"{method}: "),
                "lr": config.optimizer.lr,
                "samples": row["samples"],
                "samples_a_step": row["samples"] // row["training_steps"],
                "ema": _ema(config),
                **{metric: cell(figures[recipe][metric]) for metric in METRICS},
                "order": sum(kid.values()) / len(kid),
            }
        )
    # A run of half a step more or less is of the same budget.
    lines.sort(key=lambda line: (round(line["samples"], -3), line["order"]))
    headings = {"tried": "tried", "samples": "samples", "lr": "lr", "samples_a_step": "samples a step"}
    headings |= {"ema": "EMA (half-life)", **METRICS}
    if not lines:
        return None
    return (
        f"{table(lines, headings)}\n\nSeeds from {FIRST_SEED} on, one-step samples of"
        f" {images:,} captions; mean ± standard deviation over seeds [95 % t-interval]."
        " “recipe” is the arm of the tables, with the settings published for Sana; of it, what is named was changed."
    )


def _ema(config: Config) -> str:
    """Of the weights' average at the end of the run."""
    ema, steps = config.ema, config.train.steps
    if ema.kind == "power":
        return f"power, {ema.sigma_rel:g}"
    width = min(ema.halflife_steps, ema.ramp_up * steps) if ema.ramp_up else ema.halflife_steps
    return f"{width:.1f} of {steps} steps"
