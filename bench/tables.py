"""The paper's tables 2 to 7 on icons: equal numbers of optimised samples, several seeds, and what they decide.

    python bench/tables.py --table 4                        # runs what is missing, then prints the table
    python bench/tables.py --report                         # all tables from what has been measured so far
    python bench/tables.py --table 4 --only route_random    # a part of the runs; others may be done beside it
    python bench/tables.py --tune tbcm                      # variations of an arm, on seeds that no table uses
    python bench/tables.py --tune tbcm --try optimizer.lr=2e-4 ema.halflife_steps=50

Runs are kept in runs/tables, figures in bench/results/tables.jsonl (tuning.jsonl), tables beside them as table-N.md. A
run that is there is not repeated, one that was interrupted goes on, one that another process is at is left to it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from paper import costs, recipes, report, speed, trainings, tuning
from paper.icons import IconRunner
from paper.published import TABLES
from paper.trainings import Results, Wanted
from rows import RESULTS
from speed.measure import quiet

from tbcm.config import load_config
from tbcm.config.paths import path_argument
from tbcm.errors import UserError, command
from tbcm.runtime.allocator import reuse_freed_memory
from tbcm.runtime.distributed import pick_device
from tbcm.runtime.files import atomic_path
from tbcm.runtime.log import setup_logging

NUMBERS = sorted([*TABLES, 3])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python bench/tables.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--table", nargs="+", type=int, choices=NUMBERS, default=NUMBERS, help="default: all")
    what.add_argument("--tune", choices=tuning.METHODS, help="a method, in place of tables")
    parser.add_argument("--try", nargs="+", dest="attempt", metavar="key=value", help="--tune: this, not the grid")
    parser.add_argument("--seeds", type=int, default=3, help="of each arm")
    parser.add_argument("--budget", type=int, default=9600, help="samples that a run optimises (80 steps of 120)")
    parser.add_argument("--images", type=int, default=2000, help="samples that a student is measured on (2 to 2,400)")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="these arms; see bench/paper/recipes.py")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument(
        "--runs", type=path_argument, default=Path("runs/tables"), help="folder of trainings and references"
    )
    parser.add_argument("--out", type=path_argument, default=RESULTS, help="folder of what is written")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.budget < 1 or not 2 <= arguments.images <= 2400:
        raise UserError("--seeds and --budget should be at least 1, --images from 2 to 2400")
    if arguments.attempt and not arguments.tune:
        raise UserError("--try belongs to --tune METHOD")
    if arguments.report and (arguments.only or arguments.attempt):
        raise UserError("--report runs nothing: leave out --only and --try")
    return arguments


def tables(arguments: argparse.Namespace, device: torch.device) -> list[str]:
    """Does what is missing, and writes the tables. Returns what was left out."""
    results = Results("tables", arguments.out, arguments.images, device)
    seeds, numbers, budget = range(arguments.seeds), sorted(set(arguments.table)), arguments.budget
    problems: list[str] = []
    if not arguments.report:
        runner = _runner(arguments, device)
        chosen = [table for number in numbers for table in TABLES.get(number, ())]
        lines = [(line, table.number) for table in chosen for line in table.lines]
        wanted: list[Wanted] = [(recipes.ARMS[line.arm], line.steps, number) for line, number in lines]
        problems = _do(wanted, seeds, results, arguments, runner) if wanted else []
        if 2 in numbers and not arguments.only:
            speed.measure(results, runner, budget)
        if 3 in numbers and not arguments.only:
            costs.measure(budget, results, device)
    figures = report.Figures(results.rows(), budget, seeds)
    for number in numbers:
        _write(arguments.out / f"table-{number}.md", _table(number, figures, results, budget))
    return problems


def _table(number: int, figures: report.Figures, results: Results, budget: int) -> str:
    if number == 3:
        return costs.markdown(budget, results)
    if number != 2:
        parts = [report.markdown(of, figures, results.images, results.floor(), {}) for of in TABLES[number]]
        return "\n\n".join(parts)
    speeds = speed.cells(results)
    parts = []
    for methods in TABLES[2]:
        parts.append(report.markdown(methods, figures, results.images, results.floor(), speeds))
        parts.append(report.gaps(methods, figures, "untrained student, 1 step", "teacher, 20 steps"))
    return "\n\n".join([*parts, *([speed.NOTE] if any(row["images/s"] for row in speeds.values()) else [])])


def tune(arguments: argparse.Namespace, device: torch.device) -> list[str]:
    results = Results("tuning", arguments.out, arguments.images, device)
    method, problems = arguments.tune, []
    if not arguments.report:
        change = arguments.attempt
        chosen = [tuning.attempt(method, change)] if change else tuning.grid(method)
        wanted: list[Wanted] = [(arm, 1, None) for arm in chosen]
        seeds = range(tuning.FIRST_SEED, tuning.FIRST_SEED + arguments.seeds)
        problems = _do(wanted, seeds, results, arguments, _runner(arguments, device))
    measured = [Results("tuning", arguments.out, images, device) for images in results.image_counts()]
    parts = [tuning.markdown(each.rows(), method, each.images) for each in measured]
    text = "\n\n".join(filter(None, parts)) or "Nothing is measured yet."
    _write(arguments.out / f"tuning-{method}.md", f"### Tuning of {method}\n\n{text}")
    return problems


def _runner(arguments: argparse.Namespace, device: torch.device) -> IconRunner:
    base = load_config(recipes.CONFIGS / recipes.ARMS["tbcm"].config)
    return IconRunner(base, arguments.images, arguments.runs / "references", device)


def _do(
    wanted: list[Wanted], seeds: range, results: Results, arguments: argparse.Namespace, runner: IconRunner
) -> list[str]:
    names = list(dict.fromkeys(arm.name for arm, *_ in wanted))
    if unknown := [name for name in arguments.only or [] if name not in names]:
        raise UserError(f"--only {unknown[0]!r}: no arm of these; choose from {', '.join(map(repr, names))}")
    chosen = [each for each in wanted if not arguments.only or each[0].name in arguments.only]
    runs = trainings.runs_of(chosen, seeds, arguments.budget, arguments.runs)
    return trainings.do(runs, results, runner)


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as part:
        part.write_text(text + "\n", encoding="utf-8")
    print(text, end="\n\n")


@command
def main() -> int:
    arguments = parse()
    device = pick_device(arguments.device)
    setup_logging()
    if arguments.report:
        quiet()
    reuse_freed_memory()
    problems = (tune if arguments.tune else tables)(arguments, device)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
