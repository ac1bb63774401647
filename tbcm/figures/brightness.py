"""What the brightness filter sees and drops (paper Sec. 4.3, App. D, Fig. 10)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from tbcm.config.methods import trajectories_of
from tbcm.figures import quantities, style
from tbcm.figures.style import Drawing
from tbcm.figures.subject import Request, Subject
from tbcm.method.brightness import keep_mask
from tbcm.runtime.seeding import generator

PROMPTS = 128
PUBLISHED_THRESHOLD = 1.0
_COLUMNS, _GAP = 8, 6


@dataclass(frozen=True)
class Filtered:
    """Prompts in the order of their distance to black: which they are, mse_b, drop probability, verdict; [P] each."""

    order: Tensor
    mse: Tensor
    drop: Tensor
    kept: Tensor


def filtered(xbar0: Tensor, black: Tensor, uniform: Tensor, threshold: float) -> Filtered:
    """Scaled latents [P, C, h, w] and [C, h, w], draws [P] in [0, 1)."""
    mse, order = quantities.distance_to_black(xbar0, black).sort()
    kept = keep_mask(xbar0, black, uniform, threshold)[order]
    return Filtered(order, mse, quantities.drop_probability(mse, threshold), kept)


def make(request: Request) -> Drawing:
    subject = Subject(request, PROMPTS)
    method = trajectories_of(subject.config.method)
    route = method.route
    xbar0 = subject.end_points(subject.routes(route.kind, request.one_steps(route.points)))
    configured = method.brightness_threshold
    threshold = configured or PUBLISHED_THRESHOLD
    uniform = torch.rand(len(subject), generator=generator("cpu", subject.seed, 0, "filter"))
    result = filtered(xbar0, subject.black(), uniform, threshold)

    # The darkest, and then some from the rest of the order.
    first = min(_COLUMNS, len(subject))
    others = torch.linspace(first, len(subject) - 1, _COLUMNS).round().int().tolist() if len(subject) > first else []
    lines = [list(range(first)), sorted(set(others))]
    left, cell = 20, style.cell_size(style.WIDTH - 40, _COLUMNS, subject.sampler.size[1], _GAP)
    figure = style.page(2 * (style.cell_height(cell, subject.sampler.size) + 3 * style.LINE) + 410)
    top = 30
    for title, ranks in zip(("closest to black", "the rest, in order"), lines, strict=True):
        if not ranks:
            continue
        style.write(
            figure, left, top, f"{title} (mse_b, below it the probability to be dropped; red: dropped)", va="bottom"
        )
        images = subject.images(xbar0[result.order[ranks]])
        top = _row(figure, left, top + 6, images, cell, ranks, result) + 2 * style.LINE + 34
    axes = style.panel(figure, 120, top + 40, style.WIDTH - 150, 210)
    axes.hist(result.mse.numpy(), bins=40, color=style.BLUE, alpha=0.6)
    axes.axvline(threshold, color=style.RED, linestyle="--", label=f"threshold {threshold:g}")
    axes.set(
        xlim=(0, None), xlabel="mse_b, mean squared distance to the black latent (scaled latents)", ylabel="prompts"
    )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    style.legend_above(axes, 1)

    below, dropped = int((result.mse < threshold).sum()), int((~result.kept).sum())
    state = "as configured" if configured else "the published one; this configuration has the filter off"
    caption = (
        f"End points x_0 of the teacher '{subject.name}' in the order of their distance mse_b to a black image's latent"
        f" (paper App. D, Fig. 10): {len(subject)} prompts, one {route.kind.replace('_', '-')} route each, guidance"
        f" {subject.guidance:g}. mse_b is {float(result.mse[0]):.2f} to {float(result.mse[-1]):.2f}, median"
        f" {float(result.mse.median()):.2f}. Threshold {threshold:g} ({state}): {below} of {len(subject)} are below it,"
        f" {float(result.drop.sum()):.1f} are dropped on average and {dropped} in this draw."
    )
    numbers = {
        "threshold": threshold,
        "configured_threshold": configured,
        "below": below,
        "dropped": dropped,
        "mse": style.rounded(result.mse),
        "drop_probability": style.rounded(result.drop),
        "in_order": [subject.prompts[i] for i in result.order],
    }
    return Drawing(figure, subject.facts | numbers, caption)


def _row(
    figure: style.Figure, left: int, top: int, images: Tensor, cell: int, ranks: list[int], result: Filtered
) -> int:
    """Images with mse_b and drop probability below; returns where the images end."""
    bottom = style.mosaic(figure, left, top, [images], cell, _GAP)
    axes = figure.axes[-1]
    for column, rank in enumerate(ranks):
        x = column * (cell + _GAP)
        label = f"{float(result.mse[rank]):.2f}\n{float(result.drop[rank]):.0%}"
        style.write(figure, left + x + cell / 2, bottom + 4, label, ha="center", va="top")
        if not result.kept[rank]:
            frame = Rectangle((x, 0), cell - 1, bottom - top - 1, fill=False, edgecolor=style.RED, linewidth=3)
            axes.add_patch(frame)
    return bottom
