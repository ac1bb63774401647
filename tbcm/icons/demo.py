"""`make demo`: distil the shipped icons teacher for a few minutes on a CPU, and measure what came of it."""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tbcm.config import Config, load_config
from tbcm.config.paths import path_argument
from tbcm.errors import UserError, command
from tbcm.evaluation.icons import MOST_IMAGES, TEACHER_STEPS, IconJudge
from tbcm.icons.teacher import computes_bf16
from tbcm.inference.generation import Sampler
from tbcm.inference.images import save_png, sheet
from tbcm.inference.student import RUN_CONFIG
from tbcm.runtime.allocator import reuse_freed_memory
from tbcm.runtime.files import atomic_path, write_json
from tbcm.runtime.lock import RunLock
from tbcm.runtime.log import setup_logging
from tbcm.setup.networks import pipeline_of
from tbcm.setup.parts import build_parts
from tbcm.training.trainer import Trainer

SHEET_PROMPTS = (
    "solid red heart on white",
    "outline blue camera on yellow",
    "solid purple rocket on white",
    "outline green tree on yellow",
    "solid black bug on light blue",
    "solid orange fire on white",
    "outline pink key on gray",
    "solid brown trophy on yellow",
    "outline purple umbrella on white",
    "solid green leaf on light blue",
)
TIMED_STEPS = 4
PATIENCE = 1.15
"""How much longer than it was given a run may take, if the machine slows down, before it is cut off."""
REFERENCE = f"teacher_{TEACHER_STEPS}"


class Arms:
    """Everything that is compared: name -> images for given prompts."""

    def __init__(self, config: Config, trainer: Trainer) -> None:
        text, pipeline = trainer.text, pipeline_of(config)
        self.student = Sampler(trainer.student, text, config, pipeline, teacher=False, batch=64)
        self.teacher = Sampler(trainer.teacher, text, config, pipeline, teacher=True, batch=64)

    def __call__(self, arm: str, prompts: list[str], seed: int) -> Tensor:
        kind, steps = arm.rsplit("_", 1)
        return (self.teacher if kind == "teacher" else self.student)(prompts, steps=int(steps), seed=seed)


def fit(trainer: Trainer, minutes: float) -> None:
    """Makes the run's first steps, and sets its last to where `minutes` will be over at their speed: the learning rate
    falls over the last steps, which a run that is merely cut off never sees."""
    config, started, seconds = trainer.config, time.monotonic(), []
    while trainer.step < min(TIMED_STEPS, config.train.steps):
        then = time.monotonic()
        trainer.train_step()
        seconds.append(time.monotonic() - then)
    left = max(60 * minutes - (time.monotonic() - started), 0.0)
    steps = min(config.train.steps, trainer.step + int(left / statistics.median(seconds)))
    limits = {"steps": steps, "max_minutes": max(left, 1.0) / 60 * PATIENCE}
    cooldown = {"cooldown_steps": min(config.optimizer.cooldown_steps, steps // 2)}
    trainer.config = config.model_copy(
        update={
            "train": config.train.model_copy(update=limits),
            "optimizer": config.optimizer.model_copy(update=cooldown),
        }
    )


def run(config: Config, out: Path, images: int, minutes: float) -> dict[str, Any]:
    """Measures the untrained student and the teacher, trains, measures again. Returns the report."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(config, device, build_parts(config, device))
    draw_arm = Arms(config, trainer)
    judge = IconJudge(draw_arm.teacher, images, cache=None, device=device)
    pictures: dict[str, Tensor] = {}
    found: dict[str, dict[str, float]] = {}

    def arm(name: str, of: str, measured: bool = True) -> None:
        pictures[name] = draw_arm(of, list(SHEET_PROMPTS), seed=0)
        if measured:
            found[name] = judge.distances(draw_arm(of, judge.prompts, seed=0))
        progress.update()

    with tqdm(total=6, desc="measuring before", unit="arm", disable=None) as progress:
        floor = judge.floor()  # and with it the real images and the teacher's samples, which everything is compared to
        progress.update()
        arm("before", "student_1")
        for steps in (1, 2, 4, TEACHER_STEPS):
            arm(f"teacher_{steps}", f"teacher_{steps}", measured=steps < 4)
    started = time.monotonic()
    if minutes > 0:
        fit(trainer, minutes)
    stopped = trainer.run()
    train_seconds = time.monotonic() - started
    if stopped:
        raise KeyboardInterrupt
    with trainer.ema.swap(trainer.student), tqdm(total=3, desc="measuring after", unit="arm", disable=None) as progress:
        for steps in (1, 2, 4):
            arm(f"after_{steps}", f"student_{steps}", measured=steps == 1)
    order = ["before", "after_1", "after_2", "after_4", "teacher_1", "teacher_2", "teacher_4", REFERENCE]
    save_png(sheet([(_label(name), pictures[name]) for name in order], list(SHEET_PROMPTS)), out / "sheet.png")
    return {
        **_report(found, floor),
        "n_images": images,
        "n_real": len(judge.real),
        "train_seconds": round(train_seconds, 1),
        "train_steps": trainer.step,
        "sheet": str(out / "sheet.png"),
    }


def _label(name: str) -> str:
    kind, _, steps = name.partition("_")
    if kind == "before":
        return "student before, 1 step"
    plural = "s" if int(steps) > 1 else ""
    return f"{'student after' if kind == 'after' else 'teacher'}, {steps} step{plural}"


def _report(found: dict[str, dict[str, float]], floor: dict[str, float]) -> dict[str, float]:
    """KID x 1e3 (unbiased; lead with it) and FID, on EfficientNet-Lite0 features."""
    before, after = found["before"], found["after_1"]
    kids = {
        "kid_before": before["kid"],
        "kid_after": after["kid"],
        "kid_teacher": floor["teacher_kid"],
        "kid_teacher_one_step": found["teacher_1"]["kid"],
        "kid_to_teacher_before": before["kid_to_teacher"],
        "kid_to_teacher_after": after["kid_to_teacher"],
        "kid_to_teacher_of_teacher_one_step": found["teacher_1"]["kid_to_teacher"],
        "kid_to_teacher_of_teacher_two_steps": found["teacher_2"]["kid_to_teacher"],
        "kid_real_floor": floor["kid"],
    }
    fids = {
        "fid_before": before["fid"],
        "fid_after": after["fid"],
        "fid_teacher": floor["teacher_fid"],
        "fid_real_floor": floor["fid"],
    }
    return {name: round(value, 3) for name, value in kids.items()} | {
        name: round(value, 2) for name, value in fids.items()
    }


def start_afresh(folder: Path, config: Config) -> None:
    """Replaces the run of an earlier demo. Raises UserError where `folder` holds anything else."""
    if folder.exists() and any(folder.iterdir()) and not (folder / RUN_CONFIG).is_file():
        raise UserError(f"{folder} is in the way and is no run of tbcm: choose another --out")
    shutil.rmtree(folder, ignore_errors=True)
    with atomic_path(folder / RUN_CONFIG) as part:
        part.write_text(config.to_yaml(), encoding="utf-8")


@command
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tbcm.icons.demo", description=__doc__)
    parser.add_argument("--config", type=path_argument, default="configs/icons.yaml")
    parser.add_argument(
        "--out",
        type=path_argument,
        default="runs/demo",
        help="folder for report, sheet and run; an old one is replaced",
    )
    parser.add_argument(
        "--minutes", type=float, default=7.5, help="training time, of as many steps as fit; 0: the configuration's own"
    )
    parser.add_argument("--images", type=int, default=400, help="images an arm is measured on (2 to 4,000)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    if not 2 <= arguments.images <= MOST_IMAGES:
        raise UserError(f"--images {arguments.images}: give 2 to {MOST_IMAGES}")
    out: Path = arguments.out
    demo = [f"out={out / 'run'}"]
    if not torch.cuda.is_available() and computes_bf16("cpu"):
        demo += ["student.precision=bf16", "teacher.precision=bf16"]  # a step in 0.6 of the time of fp32
    config = load_config(arguments.config, demo + arguments.overrides)
    setup_logging()
    reuse_freed_memory()
    with RunLock(out):
        start_afresh(Path(config.out), config)
        report = run(config, out, arguments.images, arguments.minutes)
        write_json(out / "report.json", report)
    print(f"sheet: {report['sheet']}")
    print(", ".join(f"{key} {value}" for key, value in report.items() if key != "sheet"))


if __name__ == "__main__":
    sys.exit(main())
