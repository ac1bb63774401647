"""Where the teacher's trajectories end, by sampling strategy (paper App. B, Fig. 9a)."""

from __future__ import annotations

import torch
from torch import Tensor

from tbcm.config.methods import trajectories_of
from tbcm.figures import quantities, style
from tbcm.figures.style import Drawing
from tbcm.figures.subject import Request, Subject

PROMPTS, COLUMNS = 64, 8
EXACT_STEPS = 128
"""Of the flow-Euler solution that the others are compared with."""

SCHEDULES = {
    "flow_euler": ("flow Euler", "black"),
    "reference": ("reference", style.GREEN),
    "logit_normal": ("logit-normal", style.ORANGE),
    "random": ("random", style.BLUE),
}
"""Labels and colours, from the most even to the most random."""


def end_points(subject: Subject, kind: str, points: int) -> Tensor:
    """Scaled latents [P, C, h, w] after `points` steps: a fixed schedule, or a route for each prompt."""
    return subject.end_points(subject.schedule(points) if kind == "flow_euler" else subject.routes(kind, points))


def exact(subject: Subject) -> Tensor:
    return subject.end_points(subject.schedule(EXACT_STEPS))


def shown(subject: Subject) -> list[int]:
    """The prompts whose images are drawn."""
    count = min(COLUMNS, len(subject))
    return [i * len(subject) // count for i in range(count)]


def draw_images(figure: style.Figure, subject: Subject, rows: dict[str, Tensor]) -> int:
    """Decoded x_0 [P, C, h, w] of the shown prompts, a labelled row each; returns where they end."""
    columns, left, top, gap = shown(subject), 140, 2 * style.LINE + 10, 4
    cell = style.cell_size(style.WIDTH - left - 8, COLUMNS, subject.sampler.size[1])
    bottom = style.mosaic(figure, left, top, [subject.images(x0[columns]) for x0 in rows.values()], cell, gap)
    height = (bottom - top + gap) / len(rows)
    for row, label in enumerate(rows):
        style.write(figure, left - 10, top + row * height + (height - gap) / 2, label, ha="right", va="center")
    for column, i in enumerate(columns):
        name = style.wrapped(subject.prompts[i], cell)
        x = left + column * (cell + gap) + cell / 2
        style.write(figure, x, top - 6, name, ha="center", va="bottom", fontsize=7)
    return bottom


def page_height(subject: Subject, rows: int) -> int:
    cell = style.cell_size(style.WIDTH - 148, COLUMNS, subject.sampler.size[1])
    return 2 * style.LINE + 10 + rows * (style.cell_height(cell, subject.sampler.size) + 4)


def make(request: Request) -> Drawing:
    subject = Subject(request, PROMPTS)
    points = request.one_steps(trajectories_of(subject.config.method).points)
    reference = exact(subject)
    ends = {kind: end_points(subject, kind, points) for kind in SCHEDULES}
    errors = {kind: quantities.relative_error(x0, reference) for kind, x0 in ends.items()}

    rows = {f"{EXACT_STEPS} steps": reference} | {SCHEDULES[kind][0]: x0 for kind, x0 in ends.items()}
    figure = style.page(page_height(subject, len(rows)) + 320)
    bottom = draw_images(figure, subject, {label.replace(" ", "\n"): x0 for label, x0 in rows.items()})
    axes = style.panel(figure, 140, bottom + 40, style.WIDTH - 170, 200)
    jitter = torch.linspace(-0.22, 0.22, len(subject))
    for y, (kind, error) in enumerate(errors.items()):
        colour = SCHEDULES[kind][1]
        axes.scatter(error, y + jitter, s=8, color=colour, alpha=0.5, linewidths=0)
        axes.plot([float(error.mean())] * 2, [y - 0.38, y + 0.38], color=colour, linewidth=2.5)
    axes.set_yticks(range(len(errors)), [SCHEDULES[kind][0] for kind in errors])
    axes.set(ylim=(len(errors) - 0.4, -0.6), xlim=(0, None))
    axes.set_xlabel(f"relative error of x₀ against {EXACT_STEPS} steps, a dot a prompt; line: mean")

    numbers, words = {}, []
    for kind, error in errors.items():
        mean, spread = map(float, quantities.mean_and_spread(error))
        numbers[kind] = {"mean": round(mean, 4), "spread": round(spread, 4), "errors": style.rounded(error)}
        words.append(f"{SCHEDULES[kind][0]} {mean:.3f} ± {spread:.3f}")
    caption = (
        f"End points x_0 of the teacher '{subject.name}' by route (paper App. B, Fig. 9a): {points} points, guidance"
        f" {subject.guidance:g}, the same noise in a column. Relative error in latent space against {EXACT_STEPS}"
        f" flow-Euler steps over {len(subject)} prompts, a route each (mean ± standard deviation): {', '.join(words)}."
    )
    return Drawing(figure, subject.facts | {"points": points, "exact_steps": EXACT_STEPS, "error": numbers}, caption)
