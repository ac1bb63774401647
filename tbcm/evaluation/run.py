"""An evaluation from its options to its report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tbcm.config.resolution import Size
from tbcm.data.captions import digest
from tbcm.data.images import CaptionedImages
from tbcm.data.prompts import load_prompts
from tbcm.errors import UserError
from tbcm.evaluation import METRICS
from tbcm.evaluation.agreement import relative_errors
from tbcm.evaluation.candidates import Candidate, Candidates, open_candidates
from tbcm.evaluation.clip import Clip
from tbcm.evaluation.efficientnet import load_network
from tbcm.evaluation.generated import Generated, read
from tbcm.evaluation.icons import FEATURES, MOST_IMAGES, TEACHER_STEPS, IconJudge, spread
from tbcm.evaluation.inception import Inception
from tbcm.evaluation.photographs import PhotographJudge
from tbcm.evaluation.references import open_reference
from tbcm.evaluation.report import facts
from tbcm.evaluation.speed import speed
from tbcm.evaluation.stored import sha256
from tbcm.icons.masks import SIZE
from tbcm.runtime import distributed

DEFAULT_IMAGES = 2000


@dataclass(frozen=True)
class Options:
    """See `python -m tbcm.evaluate --help`. `cache`: for what evaluations of other sources need, too (the teacher's
    samples, features of real images, prompts)."""

    source: str
    out: Path
    cache: Path
    steps: list[int]  # none: the default
    teacher: bool = False
    average: bool = True
    agree_with: str | None = None
    images: int | None = None
    prompts: Path | None = None
    column: str = "prompt"
    reference: Path | None = None
    metrics: list[str] | None = None
    guidance: float | None = None
    seed: int = 0
    batch: int = 32
    agreement_images: int = 200
    inception: str | None = None
    clip: str | None = None


@dataclass(frozen=True)
class Measure:
    """For which prompts images are made and, on rank 0, their values and what to read these beside.

    `network` is that of the distances: values of different ones cannot be compared.
    """

    prompts: list[str]
    of: Callable[[list[Path]], dict[str, float]]
    floor: Callable[[], dict[str, float]]
    network: str | None


def evaluate(options: Options, device: torch.device) -> dict[str, Any]:
    """Every rank calls it, and gets the report."""
    candidates = open_candidates(
        options.source,
        device,
        teacher=options.teacher,
        average=options.average,
        agree_with=options.agree_with,
        batch=options.batch,
    )
    sampler = candidates.student.sampler
    config, options = sampler.config, replace(options, steps=options.steps or [sampler.default_steps])
    reference = None if options.reference is None else open_reference(options.reference)
    icons = candidates.icons and options.prompts is None and reference is None
    metrics = _metrics(options, icons, reference, candidates.teacher is not None)
    if icons:
        measure = _measure_icons(options, candidates, metrics, device)
    else:
        measure = _measure_photographs(options, reference, metrics, candidates.student.sampler.size, device)
    guidance = config.method.default_guidance if options.guidance is None else options.guidance
    rows = [_row(options, candidates, measure, metrics, steps, guidance) for steps in options.steps]
    return {
        "source": {"path": options.source, **candidates.student.identity},
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()},
        "metrics": metrics,
        "images": len(measure.prompts),
        "prompts": digest(measure.prompts),
        "guidance": guidance,
        "network": measure.network,
        "reference": None if reference is None else digest(reference.captions),
        "results": rows,
        "floor": distributed.run_on_main(measure.floor) if _of_images(metrics) else {},
        "facts": facts(device),
    }


def _row(
    options: Options, candidates: Candidates, measure: Measure, metrics: list[str], steps: int, guidance: float
) -> dict[str, Any]:
    """All values of images in so many steps."""
    prompts, row = measure.prompts, {"steps": steps}

    def generated(candidate: Candidate, prompts: list[str], steps: int) -> Generated:
        return Generated(
            candidate.sampler,
            candidate.identity,
            prompts,
            steps=steps,
            guidance=guidance,
            seed=options.seed,
            folder=options.out,
        )

    found: dict[str, float] = {}
    if _of_images(metrics):
        files = generated(candidates.student, prompts, steps).images()
        found |= distributed.run_on_main(lambda: measure.of(files))
    if "agreement" in metrics and candidates.teacher is not None:
        count = min(options.agreement_images, len(prompts))
        some = [prompts[i] for i in spread(count, len(prompts))]
        ours = generated(candidates.student, some, steps).latents()
        errors = relative_errors(ours, generated(candidates.teacher, some, TEACHER_STEPS).latents())
        found |= {"agreement_error": errors.mean().item(), "agreement_spread": errors.std().item()}
        found |= {"agreement_n": count}
    if "speed" in metrics:
        sampler, batch = candidates.student.sampler, options.batch
        found |= distributed.run_on_main(lambda: speed(sampler, prompts, steps=steps, guidance=guidance, batch=batch))
    return row | found


def _of_images(metrics: list[str]) -> bool:
    return bool({"distance", "text"} & set(metrics))


def _metrics(options: Options, icons: bool, reference: CaptionedImages | None, teacher: bool) -> list[str]:
    """Those asked for, which must be possible, or those that are."""
    lacking = {
        "distance": None if icons or reference else "real images: give --reference FOLDER",
        "agreement": None if teacher else "the teacher: give --agree-with TEACHER (folder or hub id)",
    }
    if options.metrics is None:
        return [name for name in METRICS if not lacking.get(name)]
    for name in options.metrics:
        if what := lacking.get(name):
            raise UserError(f"--metrics {name} of {options.source} needs {what}")
    return options.metrics


def _measure_icons(options: Options, candidates: Candidates, metrics: list[str], device: torch.device) -> Measure:
    assert candidates.teacher is not None  # or nothing would say that these are icons
    images, distance, text = options.images or DEFAULT_IMAGES, "distance" in metrics, "text" in metrics
    if not 2 <= images <= MOST_IMAGES:
        raise UserError(f"--images {images}: give 2 to {MOST_IMAGES}, of as many prompts")
    judge = IconJudge(candidates.teacher.sampler, images, cache=options.cache, device=device)

    def load() -> None:
        load_network(device)

    if distance or text:
        distributed.run_on_main(load)  # before anything is generated, so that a missing package is found now

    def measure(files: list[Path]) -> dict[str, float]:
        images = read(files, (SIZE, SIZE))
        if not distance:
            return judge.text(images)
        return judge(images) if text else judge.distances(images)

    def floor() -> dict[str, float]:
        of_distances = {**judge.floor(), **judge.autoencoder_floor()} if distance else {}
        return {**of_distances, **(judge.text_floor() if text else {})}

    return Measure(judge.prompts, measure, floor, FEATURES if distance else None)


def _measure_photographs(
    options: Options, reference: CaptionedImages | None, metrics: list[str], size: Size, device: torch.device
) -> Measure:
    prompts = _prompts(options, reference)
    judges: list[PhotographJudge] = []

    def load() -> str | None:
        if "distance" in metrics and reference is not None and len(reference) < 4:
            raise UserError(f"--reference {options.reference}: has {len(reference)} images; give at least 4")
        inception = Inception(options.inception, device) if "distance" in metrics else None
        clip = Clip(options.clip, device) if "text" in metrics else None
        cache = options.cache
        judges.append(PhotographJudge(reference, options.reference, size, inception=inception, clip=clip, cache=cache))
        return None if inception is None else f"inception {sha256(inception.file)}"

    # On rank 0 alone, which measures; before anything is generated, so that a missing file is found now.
    network = distributed.run_on_main(load)
    return Measure(prompts, lambda files: judges[0](files, prompts), lambda: judges[0].floor(), network)


def _prompts(options: Options, reference: CaptionedImages | None) -> list[str]:
    """Evenly spread over the file's, or the reference's captions."""
    found: Sequence[str]
    if options.prompts is not None:
        found = load_prompts(options.prompts, options.column, folder=options.cache)
    elif reference is not None:
        found = reference.captions
    else:
        raise UserError(f"{options.source}: which prompts? give --prompts FILE, or --reference FOLDER of real images")
    count = min(options.images or DEFAULT_IMAGES, len(found))
    if count < 2:
        raise UserError(f"{options.prompts or options.reference}: holds {count} prompt; give at least 2")
    return [found[i] for i in spread(count, len(found))]
