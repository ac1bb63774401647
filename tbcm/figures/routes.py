"""Routes of each strategy and the density of their times (paper Sec. 5.2, Fig. 7)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tbcm.config.methods import Route, trajectories_of
from tbcm.figures import quantities, style
from tbcm.figures.style import Drawing
from tbcm.figures.subject import Request, route_of, teacher_config
from tbcm.method.trigflow import T_MAX
from tbcm.runtime.seeding import generator
from tbcm.samples.rollouts import draw_route

KINDS = {"random": style.BLUE, "logit_normal": style.ORANGE, "reference": style.GREEN}
DRAWS, INSTANCES = 20_000, 5
_BINS = 100


def draw_routes(route: Route, t_max: float, sigma_data: float, seed: int, routes: int = DRAWS) -> Tensor:
    """[routes, N] descending times, as training draws them."""
    return draw_route(route, routes, t_max, sigma_data, generator("cpu", seed, 0, route.kind))


def histogram(routes: Tensor, t_max: float, bins: int = _BINS) -> tuple[Tensor, Tensor]:
    """Density per radian of the times after the first, [bins], and the bins' edges [bins + 1], both fp64."""
    counts, edges = np.histogram(routes[:, 1:].double().numpy(), bins=bins, range=(0, t_max), density=True)
    return torch.from_numpy(counts), torch.from_numpy(edges)


def make(request: Request) -> Drawing:
    config = teacher_config(request.source)
    points, t_max, sigma_data = (
        request.one_steps(trajectories_of(config.method).points),
        T_MAX,
        config.method.sigma_data,
    )
    figure = style.page(1040)
    numbers: dict[str, object] = {}
    lines = []
    # Halfway into fine cells: densities at their ends may be infinite or undefined.
    fine = (torch.arange(2000, dtype=torch.float64) + 0.5) * t_max / 2000
    for row, (kind, colour) in enumerate(KINDS.items()):
        route = route_of(config, kind, points)
        times = draw_routes(route, t_max, sigma_data, request.seed)
        density, edges = histogram(times, t_max)
        exact = quantities.route_density(route, fine, t_max, sigma_data)
        top = 50 + row * 320
        upper = style.panel(figure, 120, top, style.WIDTH - 150, 150)
        upper.stairs(
            density.numpy(), edges.numpy(), fill=True, color=colour, alpha=0.35, label=f"{DRAWS:,} routes drawn"
        )
        upper.plot(fine.numpy(), exact.numpy(), color="black", linewidth=1, label="exact")
        upper.set(ylabel="density,\nper radian", ylim=(0, None))
        upper.set_title(kind.replace("_", "-"), fontweight="bold")
        if row == 0:
            upper.legend(loc="lower right", bbox_to_anchor=(1, 1.0), ncol=2, borderaxespad=0.2)
        upper.tick_params(labelbottom=False)
        style.time_axis(upper, t_max, label=False)
        lower = style.panel(figure, 120, top + 158, style.WIDTH - 150, 75)
        lower.eventplot(
            times[:INSTANCES].numpy(), colors=colour, linelengths=0.8, linewidths=1.2, lineoffsets=range(5, 0, -1)
        )
        lower.set(yticks=[], ylabel="five\nroutes")
        lower.grid(False)
        style.time_axis(lower, t_max, label=row == len(KINDS) - 1)
        below = (times[:, 1:] < t_max / 4).double().mean()
        lines.append(f"{kind.replace('_', '-')} {float(below):.0%}")
        numbers[kind] = {
            "density": style.rounded(density),
            "instances": style.rounded(times[:INSTANCES]),
            "mean_t": round(float(times[:, 1:].double().mean()), 4),
            "share_below_quarter": round(float(below), 4),
        }
    numbers["edges"] = style.rounded(edges)
    caption = (
        f"Routes of {points} points for '{request.source}' (paper Sec. 5.2, Fig. 7): the density of the times after the"
        f" first, which is always t = {style.of_pi(t_max)}, from {DRAWS:,} routes (shaded) and exactly (line), and five"
        f" routes of each strategy. Share of the times below {style.of_pi(t_max / 4)}: {', '.join(lines)}. Reference"
        " routes have one time in each bin. Those of the other strategies may leave gaps, and their densities fall at"
        " the start because a route's largest draw is replaced by the first time."
    )
    return Drawing(figure, {"source": request.source, "points": points, "seed": request.seed} | numbers, caption)
