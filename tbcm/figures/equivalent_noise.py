"""The equivalent noise of the forward and the backward process (paper Eq. 8, Fig. 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from torch import Tensor

from tbcm.figures import quantities, style
from tbcm.figures.style import Drawing
from tbcm.figures.subject import Request, Subject, spread_over

PROMPTS, STEPS = 64, 50
_STRIPS, _TIMES = 2, 7


@dataclass(frozen=True)
class Curves:
    """Cosine similarity of the equivalent noise with the initial noise, [P, N] each, at times t [N].

    `predicted` is the backward one with the teacher's own x_0 at each point instead of the end of the trajectory.
    """

    t: Tensor
    forward: Tensor
    backward: Tensor
    predicted: Tensor


@dataclass(frozen=True)
class Noises:
    """Equivalent noise in units of sigma_d: the curves of all of it, and by prompt [K, C, h, w] at the points that were
    asked for; `x0` [P, C, h, w] of every prompt, in the same units."""

    curves: Curves
    forward: dict[int, Tensor]
    backward: dict[int, Tensor]
    x0: Tensor


def compute(subject: Subject, t: Tensor, kept: Mapping[int, Sequence[int]]) -> Noises:
    """Both processes share x_0, the teacher's end point, and the noise z that it was made from.

    `t` [1, N] are the times; `kept`: for some prompts the indices of those whose noise is to be had.
    """
    sigma_data, curves, ends = subject.sigma_data, [], []
    forward, backward = {}, {}
    for some, part in subject.trajectories(t):
        z, x0 = subject.noise[some], part.x0
        of_forward = quantities.equivalent_noise(quantities.forward_states(x0, z, part.t), x0, part.t)
        of_backward = quantities.equivalent_noise(part.x, x0, part.t)
        of_predicted = quantities.equivalent_noise(part.x, quantities.predicted_x0(part), part.t)
        curves.append([quantities.cosine(noise, z) for noise in (of_forward, of_backward, of_predicted)])
        ends.append(x0 / sigma_data)
        for i in sorted(kept.keys() & set(range(some.start, some.stop))):
            points = list(kept[i])
            forward[i] = of_forward[i - some.start, points] / sigma_data
            backward[i] = of_backward[i - some.start, points] / sigma_data
    return Noises(Curves(t[0], *map(torch.cat, zip(*curves, strict=True))), forward, backward, torch.cat(ends))


def draw_curves(axes: Axes, curves: Curves, t_max: float) -> None:
    t = curves.t.numpy()
    for name, values, colour, dash in (
        ("forward (noised)", curves.forward, style.BLUE, "-"),
        ("backward (generated)", curves.backward, style.RED, "-"),
        ("backward, x̂₀ as predicted at t", curves.predicted, style.RED, ":"),
    ):
        mean, spread = (part.numpy() for part in quantities.mean_and_spread(values))
        axes.plot(t, mean, dash, color=colour, label=name)
        if dash == "-":
            axes.fill_between(t, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
    axes.set_ylabel("cosine similarity\nwith the initial noise")
    axes.set_ylim(min(0, axes.get_ylim()[0]), 1.03)
    style.time_axis(axes, t_max)
    style.legend_above(axes, 3)


def curve_numbers(curves: Curves) -> dict[str, object]:
    numbers: dict[str, object] = {"t": style.rounded(curves.t)}
    for name in ("forward", "backward", "predicted"):
        mean, spread = quantities.mean_and_spread(getattr(curves, name))
        numbers[name] = {"mean": style.rounded(mean), "spread": style.rounded(spread)}
    return numbers


def make(request: Request) -> Drawing:
    subject = Subject(request, PROMPTS)
    t = subject.schedule(request.one_steps(STEPS))
    columns = spread_over(t[0].tolist(), _TIMES)
    chosen = list(range(0, len(subject), -(-len(subject) // _STRIPS)))
    noises = compute(subject, t, dict.fromkeys(chosen, columns))
    curves = noises.curves

    size = subject.sampler.size
    left, top, gap = 120, 2 * style.LINE, 4
    cell = style.cell_size(style.WIDTH - left - 10, len(columns) + 1, size[1])
    tall = style.cell_height(cell, size)
    figure = style.page(len(chosen) * (2 * tall + 3 * style.LINE) + top + 360)
    for i in chosen:
        images = [subject.images(torch.stack([*row[i], noises.x0[i]])) for row in (noises.forward, noises.backward)]
        style.write(figure, left, top - 8, f"“{subject.prompts[i]}”", style="italic", va="bottom")
        bottom = style.mosaic(figure, left, top, images, cell, gap)
        for row, name in enumerate(("forward", "backward")):
            style.write(figure, left - 10, top + (row + 0.5) * (tall + gap), name, ha="right", va="center")
        for column, label in enumerate([*(f"t = {style.of_pi(float(curves.t[k]))}" for k in columns), "x̂₀"]):
            style.write(figure, left + column * (cell + gap) + cell / 2, bottom + 4, label, ha="center", va="top")
        top = bottom + 3 * style.LINE
    axes = style.panel(figure, left, top + 10, style.WIDTH - left - 30, 270)
    draw_curves(axes, curves, subject.t_max)

    last = quantities.mean_and_spread(curves.backward[:, -1])
    half = int((curves.t - subject.t_max / 2).abs().argmin())
    middle = quantities.mean_and_spread(curves.backward[:, half])
    caption = (
        f"Equivalent noise (x_t - cos t x̂₀) / sin t of the teacher '{subject.name}' (paper Eq. 8, Fig. 3), decoded, and"
        f" its cosine similarity with the initial noise over {len(subject)} prompts (mean and standard deviation;"
        f" {len(curves.t)} flow-Euler steps, guidance {subject.guidance:g}). Forward, where x_t is the noised end point"
        f" x̂₀, it is the noise itself at every t: {float(curves.forward.mean()):.3f}. Backward, along the trajectory"
        f" that made x̂₀, it falls to {float(middle[0]):.3f} ± {float(middle[1]):.3f} at t ="
        f" {style.of_pi(float(curves.t[half]))} and {float(last[0]):.3f} ± {float(last[1]):.3f} at"
        f" {style.of_pi(float(curves.t[-1]))}. Dotted: with the teacher's prediction at x_t in place of the end point,"
        f" {float(curves.predicted[:, -1].mean()):.3f} at the last point."
    )
    return Drawing(figure, subject.facts | {"steps": len(curves.t)} | curve_numbers(curves), caption)
