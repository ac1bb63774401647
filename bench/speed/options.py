"""What the benches of training steps are asked on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Collection

import torch
from rows import RESULTS

from speed import arms
from tbcm.config.paths import path_argument
from tbcm.errors import UserError
from tbcm.runtime.distributed import pick_device


def parser(program: str, about: str | None, methods: list[str], quick: str) -> argparse.ArgumentParser:
    """With what step.py and memory.py have in common. `methods`: by default; `quick`: what --quick does."""
    options = argparse.ArgumentParser(
        prog=f"python bench/{program}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", choices=sorted(arms.MODELS), help="default: sana-600m on CUDA, icons on a CPU")
    options.add_argument("--device", choices=["cuda", "cpu"])
    options.add_argument("--arms", nargs="+", choices=list(arms.ARMS), metavar="ARM", help=", ".join(arms.ARMS))
    options.add_argument("--methods", nargs="+", choices=["tbcm", "scm", "sprint"], default=methods)
    options.add_argument("--quick", action="store_true", help=quick)
    options.add_argument("--out", type=path_argument, default=RESULTS, help="folder of what is written")
    return options


def machine(arguments: argparse.Namespace) -> tuple[torch.device, str]:
    """The device and the model."""
    device = pick_device(arguments.device)
    return device, arguments.model or ("sana-600m" if device.type == "cuda" else "icons")


def arm_names(arguments: argparse.Namespace, default: list[str], same: Collection[str]) -> list[str]:
    """Those asked for, else those of `default`, without those of which nothing differs here (`same`). Raises UserError
    where one of these is asked for."""
    if arguments.arms is None:
        return [name for name in default if name not in same]
    if useless := [name for name in arguments.arms if name in same]:
        raise UserError(f"--arms {useless[0]}: on a CPU it changes nothing; leave it out or run on a GPU")
    return list(arguments.arms)
