"""A teacher from a single file of weights: python -m tbcm.convert FILE OUT --like PIPELINE"""

from __future__ import annotations

import argparse
import sys

import torch

from tbcm.config.paths import path_argument, source_argument
from tbcm.errors import command

EPILOG = """
FILE is what people publish: Sana as NVlabs does (.pth), fine-tunes of Stable Diffusion, SDXL, SD3, FLUX and others
(.safetensors, .ckpt), with or without their text encoders and autoencoder. Everything that it does not hold is
PIPELINE's, which should be of the same architecture. OUT is then a `teacher.path`.
"""


@command
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tbcm.convert",
        description="Make a diffusers pipeline folder of a single file of weights.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=path_argument, help="the weights")
    parser.add_argument("out", type=path_argument, help="the folder to write")
    parser.add_argument(
        "--like", type=source_argument, required=True, metavar="PIPELINE", help="a diffusers folder or hub id"
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="of the weights; default: as FILE has them")
    parser.add_argument("--ema", action="store_true", help="of a training's checkpoint: the averaged weights")
    arguments = parser.parse_args()
    from tbcm.models.conversion.folder import convert

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: None}
    report = convert(
        arguments.file, arguments.out, arguments.like, dtype=dtypes[arguments.dtype], averaged=arguments.ema
    )
    for why in sorted(set(report.left_out.values())):
        names = sorted(name for name, reason in report.left_out.items() if reason == why)
        print(f"left out: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: {why}")
    taken = f"; {', '.join(report.taken)} of {arguments.like}" if report.taken else ""
    print(f"wrote {arguments.out}: {', '.join(report.converted)} of {arguments.file}{taken}")


if __name__ == "__main__":
    sys.exit(main())
