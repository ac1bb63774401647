"""Where the teacher's trajectories end, by number of route points (paper App. B, Fig. 9b)."""

from __future__ import annotations

from tbcm.figures import quantities, style, x0_by_route
from tbcm.figures.style import Drawing
from tbcm.figures.subject import Request, Subject
from tbcm.figures.x0_by_route import SCHEDULES, draw_images, end_points, exact, page_height

PROMPTS = 32
POINTS = (8, 12, 16, 20)  # the paper's Tab. 5
_SHOWN = "reference"


def make(request: Request) -> Drawing:
    subject = Subject(request, PROMPTS)
    counts = sorted(request.steps or POINTS)
    reference, rows, exact_steps = exact(subject), {}, x0_by_route.EXACT_STEPS
    means: dict[str, list[float]] = {kind: [] for kind in SCHEDULES}
    spreads: dict[str, list[float]] = {kind: [] for kind in SCHEDULES}
    for kind in SCHEDULES:
        for points in counts:
            x0 = end_points(subject, kind, points)
            mean, spread = quantities.mean_and_spread(quantities.relative_error(x0, reference))
            means[kind].append(round(float(mean), 4))
            spreads[kind].append(round(float(spread), 4))
            if kind == _SHOWN:
                rows[f"{points} points"] = x0
    rows[f"{exact_steps}\nflow-Euler\nsteps"] = reference

    figure = style.page(page_height(subject, len(rows)) + 390)
    bottom = draw_images(figure, subject, rows)
    axes = style.panel(figure, 140, bottom + 60, style.WIDTH - 170, 250)
    shift = 0.01 * (counts[-1] - counts[0] or 1)
    for k, (kind, (label, colour)) in enumerate(SCHEDULES.items()):
        x = [points + (k - 1.5) * shift for points in counts]
        axes.errorbar(x, means[kind], spreads[kind], marker="o", markersize=4, color=colour, capsize=3, label=label)
    axes.set_xticks(counts)
    axes.set(xlabel="points of the route", ylabel=f"relative error of x₀\nagainst {exact_steps} steps", ylim=(0, None))
    style.legend_above(axes, len(SCHEDULES))

    words = "; ".join(
        f"{label} {', '.join(f'{mean:.3f}' for mean in means[kind])}" for kind, (label, _) in SCHEDULES.items()
    )
    caption = (
        f"End points x_0 of the teacher '{subject.name}' by number of points (paper App. B, Fig. 9b), images along"
        f" reference routes, guidance {subject.guidance:g}, the same noise in a column. Mean relative error in latent"
        f" space against {exact_steps} flow-Euler steps over {len(subject)} prompts, a route each, at"
        f" {', '.join(map(str, counts))} points: {words}. Bars: standard deviation over prompts."
    )
    numbers = {"points": counts, "exact_steps": exact_steps, "mean": means, "spread": spreads}
    return Drawing(figure, subject.facts | numbers, caption)
