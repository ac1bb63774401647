"""Images from a student or a teacher: python -m tbcm.sample RUN_OR_PIPELINE "a prompt" ... --steps 1"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tbcm.config.paths import path_argument, source_argument, text_argument
from tbcm.config.resolution import parse_size
from tbcm.errors import UserError, command

EPILOG = """
examples:
  python -m tbcm.sample runs/icons "solid red heart on white" "outline blue key" --steps 1
  python -m tbcm.sample icons "solid red heart on white" --teacher --steps 20
  python -m tbcm.sample runs/sana "a red panda" --size 832x1216
"""


@command
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tbcm.sample",
        description="Generate images from prompts; write PNGs and a sheet.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", type=source_argument, help="a run's folder, a diffusers pipeline (folder or hub id), or 'icons'"
    )
    parser.add_argument("prompts", nargs="+", type=text_argument, help="one image each")
    parser.add_argument("--teacher", action="store_true", help="sample the run's teacher, or a pipeline that is one")
    parser.add_argument("--steps", type=int, help="default: 1, or what the method says; 20 for a teacher")
    parser.add_argument("--guidance", type=float, help="default: the middle one of those trained on")
    parser.add_argument("--size", help="HEIGHTxWIDTH, or one number for a square; default: the first trained on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", choices=["ema", "last"], default="ema", help="of a run: averaged or last weights")
    parser.add_argument("--out", type=path_argument, default="samples", help="folder for the images (default: samples)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    arguments = parser.parse_args()
    if arguments.steps is not None and not 1 <= arguments.steps <= 1000:
        raise UserError(f"--steps {arguments.steps}: give a number from 1 to 1000")

    size = None if arguments.size is None else parse_size(arguments.size)

    from tbcm.inference.generation import open_sampler
    from tbcm.inference.images import save_png, sheet

    sampler = open_sampler(
        arguments.source,
        teacher=arguments.teacher,
        average=arguments.weights == "ema",
        device=arguments.device,
        size=size,
    )
    steps = arguments.steps or sampler.default_steps
    images = sampler(arguments.prompts, steps=steps, guidance=arguments.guidance, seed=arguments.seed)
    out: Path = arguments.out
    for i, image in enumerate(images):
        save_png(image, out / f"{i:04d}.png")
    save_png(sheet([(f"{steps} step" + "s" * (steps > 1), images)], arguments.prompts), out / "sheet.png")
    print(f"wrote {len(images)} image{'s' * (len(images) > 1)} and {out / 'sheet.png'}")


if __name__ == "__main__":
    sys.exit(main())
