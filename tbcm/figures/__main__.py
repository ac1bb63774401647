"""The paper's figures, of any teacher or run: python -m tbcm.figures NAME RUN_OR_TEACHER"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from tbcm.config.paths import path_argument, source_argument
from tbcm.errors import UserError, command
from tbcm.figures import FIGURES

EPILOG = """
figures:
{}

examples:
  python -m tbcm.figures equivalent-noise                      # of the shipped icons teacher
  python -m tbcm.figures x0-by-steps runs/sana --steps 8 16 32 --images 32
  python -m tbcm.figures fid-throughput student/report.json teacher/report.json
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tbcm.figures",
        description="Draw a figure of the paper from a teacher or a run: NAME.png, NAME.svg, NAME.json with the numbers"
        " behind it, and NAME.md with its caption, which is printed too.",
        epilog=EPILOG.format("\n".join(f"  {name:20} {text}" for name, text in FIGURES.items())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="one of those below")
    parser.add_argument(
        "sources",
        nargs="*",
        type=source_argument,
        metavar="RUN_OR_TEACHER",
        help="a run's folder, a diffusers pipeline (folder or hub id) or 'icons' (default); fid-throughput: reports",
    )
    parser.add_argument("--prompts", "--images", type=int, metavar="N", help="how many; default: each figure's own")
    parser.add_argument(
        "--prompt-file",
        type=source_argument,
        metavar="FILE",
        help="default: the run's, or the icons's for the icons teacher",
    )
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[], metavar="N", help="of a trajectory, or route points"
    )
    parser.add_argument("--guidance", type=float, help="default: the middle one of those trained on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--out", type=path_argument, default=Path("figures"), help="folder (default: figures)")
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse()
    if arguments.name not in FIGURES:
        raise UserError(f"{arguments.name}: no such figure; there are {', '.join(FIGURES)}")
    if arguments.prompts is not None and not 1 <= arguments.prompts <= 100_000:
        raise UserError(f"--prompts {arguments.prompts}: give a number from 1 to 100,000")
    for steps in arguments.steps:
        if not 1 <= steps <= 1000:
            raise UserError(f"--steps {steps}: give numbers from 1 to 1000")
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed}: give at least 0")

    from tbcm.figures import style
    from tbcm.figures.subject import Request
    from tbcm.runtime.allocator import reuse_freed_memory

    reuse_freed_memory()
    request = Request(
        sources=tuple(arguments.sources),
        prompts=arguments.prompts,
        prompt_file=arguments.prompt_file,
        steps=tuple(arguments.steps),
        guidance=arguments.guidance,
        seed=arguments.seed,
        device=arguments.device,
    )
    figure = importlib.import_module(f"tbcm.figures.{arguments.name.replace('-', '_')}")
    drawing = figure.make(request)
    paths = style.save(drawing, arguments.name, arguments.out)
    print(drawing.caption)
    print("wrote " + ", ".join(map(str, paths)))


if __name__ == "__main__":
    sys.exit(main())
