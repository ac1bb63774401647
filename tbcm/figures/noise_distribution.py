"""How the distribution of equivalent noise moves: the curves of Eq. 8, and t-SNE maps (paper App. A, Fig. 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tbcm.errors import UserError
from tbcm.figures import quantities, style
from tbcm.figures.equivalent_noise import Noises, compute, curve_numbers, draw_curves
from tbcm.figures.style import Drawing
from tbcm.figures.subject import Request, Subject, spread_over

PROMPTS, STEPS = 400, 20
_TIMES = 5
_PERPLEXITY, _NEIGHBOURS = 30, 10  # or fewer, for few prompts


def mapped(prompts: int, points: Sequence[int]) -> dict[int, list[int]]:
    """The prompts that are on the maps, equally many for each of the route points `points`, and the point of each.

    A prompt at one time only: a map of one trajectory's points would show which trajectory they are of.
    """
    return {i: [points[i % len(points)]] for i in range(prompts - prompts % len(points))}


def groups(noises: Noises, fresh: Tensor, points: Mapping[int, Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Equivalent noise of the `mapped` prompts, forward and backward: [M, C h w] each.

    The forward process has noise of its own, `fresh` [P, C, h, w] (in units of sigma_d), again lest trajectories show.
    """
    every, at = list(points), [point for (point,) in points.values()]
    t, x0 = noises.curves.t[at][:, None], noises.x0[every]
    forward = quantities.equivalent_noise(quantities.forward_states(x0, fresh[every], t), x0, t)
    return forward.flatten(1), torch.cat([noises.backward[i] for i in every]).flatten(1)


def load_tsne() -> Any:
    """scikit-learn's class. Raises UserError where it is not installed."""
    try:
        from sklearn.manifold import TSNE
    except ModuleNotFoundError as error:
        raise UserError("noise-distribution needs scikit-learn: pip install tbcm[figures]") from error
    return TSNE


def make(request: Request) -> Drawing:
    subject = Subject(request, PROMPTS)
    if len(subject) < 2 * _TIMES:
        raise UserError(f"--prompts {len(subject)}: noise-distribution needs at least {2 * _TIMES}")
    tsne = load_tsne()  # before what takes long
    schedule = subject.schedule(request.one_steps(STEPS))
    t = schedule[0]
    points = spread_over(t.tolist(), _TIMES)
    on_maps = mapped(len(subject), points)
    noises = compute(subject, schedule, on_maps)
    both = groups(noises, subject.fresh_noise(subject.seed + 1) / subject.sigma_data, on_maps)
    perplexity = min(_PERPLEXITY, (2 * len(on_maps) - 1) / 3)
    embed = tsne(perplexity=perplexity, init="pca", random_state=subject.seed).fit_transform
    maps = torch.from_numpy(embed(torch.cat(both).float().numpy())).chunk(2)
    labels = torch.arange(len(on_maps)) % len(points)
    sizes = [[float(samples[labels == k].square().mean().sqrt()) for k in range(len(points))] for samples in both]
    neighbours = min(_NEIGHBOURS, len(on_maps) - 1)
    shares = [quantities.same_label_share(samples, labels, neighbours) for samples in maps]

    figure = style.page(930)
    draw_curves(style.panel(figure, 120, 50, style.WIDTH - 150, 230), noises.curves, subject.t_max)
    colours = style.sequence(len(points))
    for column, (name, samples) in enumerate(zip(("forward", "backward"), maps, strict=True)):
        axes = style.panel(figure, 120 + column * 545, 420, 505, 440)
        for k, (point, colour) in enumerate(zip(points, colours, strict=True)):
            own = samples[labels == k].numpy()
            axes.scatter(
                own[:, 0], own[:, 1], s=14, color=colour, edgecolors="none", label=f"t = {style.of_pi(float(t[point]))}"
            )
        both_maps = torch.cat(maps)
        low, high = both_maps.amin(0), both_maps.amax(0)
        margin = 0.04 * (high - low)
        axes.set(xlim=((low - margin)[0], (high + margin)[0]), ylim=((low - margin)[1], (high + margin)[1]))
        axes.set(xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2" if column == 0 else "")
        axes.set_title(f"{name}: {shares[column]:.0%} of the nearest {neighbours} are of the same t")
        if column == 0:
            handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncol=len(points), bbox_to_anchor=(0.53, 0.0), frameon=False)

    mean = noises.curves.backward[:, points].mean(0)
    fall = ", ".join(f"{float(m):.3f} at {style.of_pi(float(t[k]))}" for m, k in zip(mean, points, strict=True))
    caption = (
        f"Distribution of the equivalent noise of the teacher '{subject.name}' (paper App. A, Fig. 8), {len(subject)}"
        f" prompts, {len(t)} flow-Euler steps, guidance {subject.guidance:g}. Above: cosine similarity with the initial"
        f" noise, forward {float(noises.curves.forward.mean()):.3f} at all times, backward {fall}. Below: one t-SNE map"
        f" of both processes (perplexity {perplexity:.3g}), {len(labels) // len(points)} prompts for each time, others"
        f" at each. Of a point's {neighbours} nearest neighbours on the map {shares[0]:.0%} are of its own time in the"
        f" forward process and {shares[1]:.0%} in the backward one; {1 / len(points):.0%} would mean that times cannot"
        f" be told apart. The noise itself shrinks: its root mean square, in units of sigma_d, is {min(sizes[0]):.2f}"
        f" to {max(sizes[0]):.2f} forward and goes from {sizes[1][0]:.2f} to {sizes[1][-1]:.2f} backward."
    )
    numbers = {"steps": len(t), "map_t": style.rounded(t[points]), "same_t_share": shares, "rms": sizes}
    numbers |= {"perplexity": perplexity, "neighbours": neighbours}
    maps_json = {"map_forward": style.rounded(maps[0], 2), "map_backward": style.rounded(maps[1], 2)}
    return Drawing(figure, subject.facts | numbers | curve_numbers(noises.curves) | maps_json, caption)
