"""All of the stand-in from npm, in stages: drawings, autoencoder, latents and text states, teacher.

    python -m tbcm.icons.make WORK OUT [--packages DIR] [--autoencoder-steps N] [--resume-from ASSETS] [--steps N] ...

What is done already is not done again, and what was interrupted goes on: the same command, as often as it takes. The
teacher trains until one stops it, unless `--steps` or `--minutes` says otherwise; OUT is usable from the first export.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tbcm.config.paths import path_argument
from tbcm.errors import command
from tbcm.icons import autoencoder, dataset, teacher
from tbcm.icons.packages import fetch
from tbcm.icons.training import Budget, add_training_arguments, budget_of

AUTOENCODER = Budget(steps=7000, cooldown=800)


def make_drawings(work: Path, packages: Path | None) -> None:
    """The first stage, unless it is done."""
    if (work / "shapes.json").is_file():  # written last
        return
    packages = packages or work / "packages"
    fetch(packages)
    dataset.build(work, packages)


def make(
    work: Path, out: Path, packages: Path | None, first: Budget, budget: Budget, device: str, resume_from: Path | None
) -> None:
    """Every stage. With `resume_from` drawings and autoencoder come from there, so that the first two fall away."""
    if resume_from is None:
        make_drawings(work, packages)
        autoencoder.train(work, work / "autoencoder", first, device)
    teacher.train(work, out, budget, device, resume_from)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tbcm.icons.make", description="Make the stand-in from npm.")
    parser.add_argument("work", type=path_argument, help="folder for drawings, autoencoder, caches and checkpoints")
    parser.add_argument("out", type=path_argument, help="the asset folder")
    parser.add_argument(
        "--packages", type=path_argument, help="folder of npm tarballs; those missing are fetched by `npm pack`"
    )
    parser.add_argument("--autoencoder-steps", type=int, default=AUTOENCODER.steps, help="before its cooldown")
    parser.add_argument("--resume-from", type=path_argument, help="asset folder of a training that goes on here")
    add_training_arguments(parser)
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse()
    first = Budget(steps=arguments.autoencoder_steps, cooldown=AUTOENCODER.cooldown)
    budget, source = budget_of(arguments), arguments.resume_from
    make(arguments.work, arguments.out, arguments.packages, first, budget, arguments.device, source)


if __name__ == "__main__":
    sys.exit(main())
