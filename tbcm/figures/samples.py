"""Sheets of a student in few steps beside its teacher (paper Figs. 2, 11, 12)."""

from __future__ import annotations

import logging
from pathlib import Path

from tbcm.errors import UserError
from tbcm.figures import style
from tbcm.figures.style import Drawing
from tbcm.figures.subject import Request, choose_prompts, is_student, open_teacher, teacher_config
from tbcm.inference.generation import Sampler, open_sampler
from tbcm.inference.student import PIPELINE_CONFIG, open_origin

logger = logging.getLogger(__name__)

PROMPTS, COLUMNS = 16, 8
STEPS, TEACHER_STEPS = (1, 2, 4), 20


def open_arms(request: Request) -> tuple[Sampler | None, Sampler | None]:
    """Student and teacher: both of a run, and of an exported pipeline whose teacher can be read; else the one there
    is."""
    path = request.source
    if not open_origin(path).is_run and not is_student(path):
        return None, open_teacher(teacher_config(path), request.device)
    student = open_sampler(path, device=request.device)
    if not (Path(path) / PIPELINE_CONFIG).is_file() and not open_origin(path).is_run:
        return student, None  # a student that this package did not write: its teacher is not known
    try:
        return student, open_teacher(teacher_config(path), request.device)
    except UserError as error:
        logger.warning("drawn without the teacher: %s", error)
        return student, None


def make(request: Request) -> Drawing:
    student, teacher = open_arms(request)
    sampler = student or teacher
    assert sampler is not None
    prompts = choose_prompts(sampler.config, request.prompt_file, request.prompts or PROMPTS)
    guidance = sampler.config.method.default_guidance if request.guidance is None else request.guidance
    steps = request.steps or STEPS
    arms = [("student", student, n) for n in steps] if student else [("teacher", teacher, n) for n in steps]
    if teacher and ("teacher", teacher, TEACHER_STEPS) not in arms:
        arms.append(("teacher", teacher, TEACHER_STEPS))
    rows = {
        f"{name}\n{n} step{'s' if n > 1 else ''}": arm(prompts, steps=n, guidance=guidance, seed=request.seed)
        for name, arm, n in arms
        if arm
    }

    left, gap, blocks = 140, 4, -(-len(prompts) // COLUMNS)
    cell = style.cell_size(style.WIDTH - left - 8, COLUMNS, next(iter(rows.values())).shape[-1], gap)
    block = 3 * style.LINE + len(rows) * (cell + gap)
    figure = style.page(blocks * block + 10)
    for b in range(blocks):
        some, top = slice(b * COLUMNS, (b + 1) * COLUMNS), b * block + 3 * style.LINE
        style.mosaic(figure, left, top, [images[some] for images in rows.values()], cell, gap)
        for row, label in enumerate(rows):
            style.write(figure, left - 10, top + row * (cell + gap) + cell / 2, label, ha="right", va="center")
        for column, prompt in enumerate(prompts[some]):
            x = left + column * (cell + gap) + cell / 2
            style.write(figure, x, top - 6, style.wrapped(prompt, cell), ha="center", va="bottom", fontsize=7)

    shown = ", ".join(label.replace("\n", " in ") for label in rows)
    caption = (
        f"Samples of '{request.source}' (paper Figs. 2, 11, 12): {shown}; one prompt and one noise in a column,"
        f" guidance {guidance:g}, seed {request.seed}, {len(prompts)} prompts spread over the prompt file, not picked."
    )
    numbers = {"source": request.source, "seed": request.seed, "guidance": guidance, "prompts": prompts}
    return Drawing(figure, numbers | {"rows": [label.replace("\n", ", ") for label in rows]}, caption)
