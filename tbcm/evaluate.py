"""Measure a student or a teacher: python -m tbcm.evaluate RUN_OR_PIPELINE (with torchrun for many ranks)."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tbcm.config.paths import path_argument, source_argument, text_argument
from tbcm.errors import UserError, command
from tbcm.evaluation import METRICS
from tbcm.runtime import failure

EVALUATIONS = Path("evaluation")
EPILOG = """
examples:
  python -m tbcm.evaluate runs/icons --steps 1 2 4
  python -m tbcm.evaluate icons --teacher --steps 20
  torchrun --nproc_per_node 8 -m tbcm.evaluate runs/sana --reference MJHQ-30K --images 30000 --steps 1 2
  python -m tbcm.evaluate exported --agree-with TEACHER --prompts prompts.txt --metrics agreement speed

metrics (default: all for which there is what they need):
  distance   KID and FID. Icons: to the shipped real images and to the teacher's samples, on EfficientNet-Lite0
             features. Others: to --reference, on Inception features (--inception, else downloaded).
  text       what the captions say. Icons: concept, colours and style, coverage and recall. Others: CLIP score (--clip).
  agreement  error of the latents to the teacher's 20-step ones from the same noise. Needs no images.
  speed      throughput at --batch and latency of one image, each with and without decoding; text encoding apart.

It may be stopped at any time: the same command goes on, and keeps every image that is there. Image i depends on its
prompt, --seed and i alone, however many ranks there are. All nodes must see --out.
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tbcm.evaluate",
        description="Measure images, agreement with the teacher, and speed; write OUT/report.json and print a table.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", type=source_argument, help="a run's folder, a diffusers pipeline (folder or hub id), or 'icons'"
    )
    parser.add_argument("--teacher", action="store_true", help="the run's teacher, or a pipeline that is one")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        help="default: 1, or what the method says; 20 for a teacher",
    )
    parser.add_argument("--metrics", nargs="+", choices=METRICS, help="see below")
    parser.add_argument("--images", type=int, help="default: 2000, or as many prompts as there are")
    parser.add_argument(
        "--prompts", type=path_argument, help="a .txt, .jsonl, .csv or .parquet file (default: --reference's)"
    )
    parser.add_argument(
        "--column", type=text_argument, default="prompt", help="of the prompts in that file (default: prompt)"
    )
    parser.add_argument(
        "--reference", type=path_argument, help="real images: MJHQ-30k's layout, or with a metadata.jsonl"
    )
    parser.add_argument(
        "--agree-with",
        type=source_argument,
        metavar="TEACHER",
        help="an exported pipeline's teacher (a run knows its own)",
    )
    parser.add_argument("--agreement-images", type=int, default=200, help="that agreement is measured on")
    parser.add_argument("--inception", type=source_argument, metavar="PATH", help="inception-2015-12-05.pt")
    parser.add_argument(
        "--clip",
        type=source_argument,
        metavar="MODEL",
        help="folder or hub id (default: openai/clip-vit-large-patch14)",
    )
    parser.add_argument("--guidance", type=float, help="default: the middle one of those trained on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32, help="images that are made at once (default: 32)")
    parser.add_argument("--weights", choices=["ema", "last"], default="ema", help="of a run: averaged or last weights")
    parser.add_argument(
        "--out", type=path_argument, help="default: evaluation/NAME of the source, with --teacher NAME-teacher"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    return parser.parse_args()


def default_out(source: str, *, teacher: bool) -> Path:
    """A folder for each source, which is known by the last part of its path or hub id."""
    return EVALUATIONS / (Path(os.path.realpath(source)).name + "-teacher" * teacher)


@command
@failure.reported
def main() -> None:
    arguments = vars(parse())
    device_type, average = arguments.pop("device"), arguments.pop("weights") == "ema"
    arguments["steps"] = arguments["steps"] or []
    out = arguments["out"]
    arguments["cache"] = (out or EVALUATIONS) / "cache"
    arguments["out"] = out or default_out(arguments["source"], teacher=arguments["teacher"])
    limits = (("steps", 1, 1000), ("images", 2, None), ("batch", 1, None), ("agreement_images", 2, None))
    for name, low, high in (*limits, ("seed", 0, None)):
        values = arguments[name] if isinstance(arguments[name], list) else [arguments[name]]
        for value in values:
            if value is not None and (value < low or (high and value > high)):
                raise UserError(
                    f"--{name.replace('_', '-')} {value}: give at least {low}" + f", at most {high}" * bool(high)
                )

    from tbcm.evaluation.report import UNITS, table
    from tbcm.evaluation.run import Options, evaluate
    from tbcm.runtime import distributed
    from tbcm.runtime.allocator import reuse_freed_memory
    from tbcm.runtime.files import write_json
    from tbcm.runtime.job import job

    options = Options(**arguments, average=average)
    with job(options.out, device_type) as device:
        reuse_freed_memory()
        report = evaluate(options, device)
        if distributed.is_main():
            write_json(options.out / "report.json", report | {"units": UNITS})
            print(table(report))
            print(f"wrote {options.out / 'report.json'}")


if __name__ == "__main__":
    sys.exit(main())
