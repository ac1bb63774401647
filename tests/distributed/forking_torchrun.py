"""torchrun, whose ranks are forks of the agent: they import nothing, which takes most of a rank's start.

python forking_torchrun.py MODULES TORCHRUN'S ARGUMENTS...      # MODULES, separated by commas, are what ranks will need

All but the start of a rank is torchrun's own.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from torch.distributed import run
from torch.distributed.launcher.api import LaunchConfig
from torchrun import as_a_process_of_its_own


def main() -> None:
    modules, arguments = sys.argv[1], sys.argv[2:]
    for module in modules.split(","):
        importlib.import_module(module)
    read = run.config_from_args

    def forking(args: Namespace) -> tuple[LaunchConfig, Callable[..., None], list[Any]]:
        config, _, _ = read(args)
        return (
            replace(config, start_method="fork"),
            _rank,
            [args.module, args.training_script, args.training_script_args],
        )

    with patch.object(run, "config_from_args", forking):
        run.main(arguments)


def _rank(is_module: bool, program: str, arguments: list[str]) -> None:
    as_a_process_of_its_own()
    sys.argv = [program, *arguments]
    if is_module:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
