"""A run's student as a diffusers pipeline: python -m tbcm.export RUN OUT"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from tbcm.config.paths import path_argument
from tbcm.errors import UserError, command

EPILOG = """
The folder loads with plain diffusers. The call that fits the student (its size, its guidance, and times for one step)
is printed, and written into the folder's README.md.
"""


@command
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tbcm.export",
        description="Write a run's student as a folder that plain diffusers loads.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=path_argument, help="the `out` folder of a training run")
    parser.add_argument("out", type=path_argument, help="the folder to write")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the weights")
    parser.add_argument("--weights", choices=["ema", "last"], default="ema", help="averaged or last weights")
    parser.add_argument(
        "--adapter", action="store_true", help="of a LoRA run: the adapter alone, for the teacher's own pipeline"
    )
    arguments = parser.parse_args()
    from tbcm.inference.adapter import export_adapter
    from tbcm.inference.exporting import export
    from tbcm.inference.pipeline_call import how_to_call
    from tbcm.inference.student import open_origin

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.dtype]
    out: Path = arguments.out
    if os.path.lexists(out):  # a link that leads nowhere, too
        raise UserError(f"{out} exists already: choose another folder or remove it")
    run, average = str(arguments.run), arguments.weights == "ema"
    if arguments.adapter:
        call = export_adapter(run, out, dtype=dtype, average=average)
    else:
        export(run, out, dtype=dtype, average=average)
        call = how_to_call(open_origin(str(out)), dtype)
    print(f"wrote {out}; with plain diffusers:\n\n{call}", end="")


if __name__ == "__main__":
    sys.exit(main())
