"""Distil a teacher: python -m tbcm.train CONFIG [key=value ...] (with torchrun for several GPUs or nodes)."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tbcm.config import Config, load_config
from tbcm.config.paths import path_argument
from tbcm.errors import UserError, command
from tbcm.runtime import failure

if TYPE_CHECKING:
    import torch

EPILOG = """
examples:
  python -m tbcm.train configs/icons.yaml
  python -m tbcm.train configs/icons.yaml train.steps=500 optimizer.lr=5e-5 out=runs/try
  torchrun --nnodes 4 --nproc_per_node 8 -m tbcm.train configs/sana.yaml data.prompts=prompts.parquet
"""


WRITTEN = "", "checkpoints", "images", "profile", "prompts"
"""Folders of a run in which files appear whole."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tbcm.train",
        description="Distil a text-to-image teacher into a one-step student, from prompts alone.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=path_argument, help="a YAML file, such as configs/icons.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override, such as train.steps=500: text as it is, with quotes and all (null: none); the rest in YAML",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest whole checkpoint; start where there is none"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument(
        "--dry-run", action="store_true", help="build everything, take one step, print its cost and exit"
    )
    return parser.parse_intermixed_args()


@command
@failure.reported
def main() -> int | None:
    arguments = parse()
    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(config.to_yaml(), end="")
    elif arguments.dry_run:
        from tbcm.training.dryrun import dry_run

        dry_run(config, arguments.device)
    else:
        return train(config, resume=arguments.resume, device=arguments.device)
    return None


def train(config: Config, *, resume: bool = False, device: str | None = None) -> int:
    """The whole run of a configuration in this process (one of several under torchrun).

    Returns the exit code: 130 for a run that was asked to stop (and has saved).
    """
    from datetime import timedelta

    import torch

    from tbcm.runtime import distributed
    from tbcm.runtime.allocator import reuse_freed_memory
    from tbcm.runtime.leftovers import remove_leftovers
    from tbcm.runtime.lock import RunLock
    from tbcm.runtime.log import log_to_file, setup_logging
    from tbcm.runtime.watchdog import Watchdog

    timeout = 60 * config.parallel.timeout_minutes
    # The watchdog knows more of a rank that hangs than a collective that waits for it: it is to come first.
    torch_device = distributed.init(device, timedelta(seconds=timeout + 120))
    reuse_freed_memory()
    setup_logging()
    lock = RunLock(config.out)
    distributed.run_on_main(lock.acquire)
    try:
        log_to_file(config.out)
        distributed.run_on_main(lambda: remove_leftovers(*(Path(config.out, name) for name in WRITTEN)))
        with Watchdog(timeout):
            code = _run(config, torch_device, distributed.is_restart() or resume)
            distributed.shutdown()  # not after an error: the other ranks may be stuck, and `failure` ends this one
        return code
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory ({error}): lower train.prompts_per_rollout, train.prompts_per_micro_batch or"
            " train.points_per_micro_batch, or set student.checkpointing=full (the result is the same)"
        ) from None
    finally:
        lock.release()


def _run(config: Config, device: torch.device, resume: bool) -> int:
    """A function of its own: when it has returned, nothing holds on to the process group any more."""
    from tbcm.runtime import distributed
    from tbcm.runtime.checkpoint_files import checkpoints_in
    from tbcm.runtime.files import atomic_path
    from tbcm.setup.parts import build_parts
    from tbcm.training.trainer import Trainer

    logger = logging.getLogger("tbcm")
    begun = distributed.run_on_main(lambda: bool(checkpoints_in(Path(config.out) / "checkpoints")))
    if begun and not resume:
        raise UserError(f"{config.out} holds a run already: continue it with --resume, or choose another `out`")
    trainer = Trainer(config, device, build_parts(config, device))
    if begun:
        trainer.resume()
    elif resume and distributed.is_main():
        logger.warning("%s has no checkpoint to continue from: starting", config.out)
    if distributed.is_main():
        with atomic_path(Path(config.out) / "config.yaml") as part:
            part.write_text(config.to_yaml(), encoding="utf-8")
    stopped = trainer.run()
    if trainer.step < config.train.steps:
        logger.info("the same command with --resume continues")
    return 130 if stopped else 0


if __name__ == "__main__":
    sys.exit(main())
