"""Tables of quality as Markdown, from rows alone: means, spreads, and whether the paper's order came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rows import Row, table

from paper import recipes
from paper.published import Line, Pairs, Table
from paper.statistics import Summary, paired, summary, together, verdict

METRICS = {
    "kid": "KID x 1e3",
    "fid": "FID",
    "kid_heldout": "KID x 1e3, held-out combinations",
    "kid_to_teacher": "KID x 1e3 to the teacher",
    "fid_to_teacher": "FID to the teacher",
    "agreement_error": "error from the same noise",
    "concept": "concept right",
    "coverage": "coverage",
}
HIGHER_IS_BETTER = {"concept", "coverage"}
SHOWN = ("kid", "fid", "kid_heldout", "kid_to_teacher", "agreement_error", "concept", "coverage")
TO_TEACHER = {"kid_to_teacher", "agreement_error"}
"""Distances to the teacher's 20 steps, which says nothing of those themselves."""
BySeed = dict[int, float]


class Figures:
    """What was measured, by arm: `rows` are those of one number of images."""

    def __init__(self, rows: Sequence[Row], budget: int, seeds: Sequence[int]) -> None:
        self.budget, self.seeds = budget, list(seeds)
        self._rows = rows
        self._recipes: dict[str, str] = {}

    def of(self, line: Line, metric: str) -> BySeed:
        """Values by seed, of the seeds asked for."""
        steps = None if metric == "train_seconds" else line.steps
        return {row["seed"]: row["value"] for row in self._of(line.arm, metric) if row["sampling_steps"] == steps}

    def samples(self, line: Line) -> int | None:
        return next((row.get("samples") for row in self._of(line.arm, "evaluate_seconds")), None)

    def origin(self, of: Table) -> str:
        """Where, when and by which code the figures of a table were measured."""
        rows = [row for line in of.lines for row in self._of(line.arm, "evaluate_seconds")]
        if not rows:
            return "Nothing is measured yet."
        machines, torches, commits = (sorted({str(row[key]) for row in rows}) for key in ("cpu", "torch", "commit"))
        gpus = sorted({row["gpu"] for row in rows if row["gpu"]})
        dates = sorted(row["date"][:10] for row in rows)
        when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        facts = ", ".join(gpus or machines), f"torch {', '.join(torches)}", f"commit {', '.join(commits)}", when
        return f"Measured on {'; '.join(facts)}."

    def changed(self, line: Line) -> bool:
        """Whether its arm was measured with another recipe than it has now, at this budget."""
        samples = recipes.samples(recipes.config_of(recipes.ARMS[line.arm], 0, self.budget))
        found = (row for row in self._rows if row["arm"] == line.arm and row.get("samples") == samples)
        return any(row["recipe"] != self._recipe(line.arm) for row in found)

    def _of(self, arm: str, metric: str) -> list[Row]:
        recipe = self._recipe(arm)
        return [
            row
            for row in self._rows
            if row["metric"] == metric and row["recipe"] == recipe and row["seed"] in self.seeds
        ]

    def _recipe(self, arm: str) -> str:
        if arm not in self._recipes:
            one = recipes.ARMS[arm]
            self._recipes[arm] = recipes.recipe(one, recipes.config_of(one, 0, self.budget))
        return self._recipes[arm]


def markdown(of: Table, figures: Figures, images: int, floor: Mapping[str, float], extra: Mapping[str, Row]) -> str:
    """A table of the paper. `extra`: further cells, by label of a row."""
    rows: list[Row] = [
        {
            "label": line.label,
            **{metric: cell(figures.of(line, metric)) for metric in SHOWN},
            "samples": figures.samples(line),
            "paper_fid": line.fid,
            "paper_clip": line.clip,
            **extra.get(line.label, {}),
        }
        for line in of.lines
    ]
    headings = {
        "label": of.title,
        **{metric: METRICS[metric] for metric in SHOWN},
        "samples": "samples",
        **{key: key for cells in extra.values() for key in cells},
        "paper_fid": "paper: FID",
        "paper_clip": "paper: CLIP",
    }
    shown = {key: name for key, name in headings.items() if any(row.get(key) is not None for row in rows)}
    parts = [f"### Table {of.number}: {of.title}", table(rows, shown), _legend(images), *of.notes]
    if floor:
        parts.append(_floor(floor))
    for what, pairs, metrics in (
        ("FID", of.by_fid, ("kid", "fid", "kid_heldout", "kid_to_teacher", "agreement_error")),
        ("CLIP score", of.by_clip, ("concept",)),
    ):
        if pairs:
            parts += order(of, figures, what, pairs, metrics)
    if pending := _pending(of, figures):
        parts.append(f"Not measured yet: {pending}.")
    parts.append(figures.origin(of))
    return "\n\n".join(parts)


def order(of: Table, figures: Figures, what: str, pairs: Pairs, metrics: Sequence[str]) -> list[str]:
    """One line that decides, and the pairs that it was decided by. The first of `metrics` is the one that counts."""
    verdicts: dict[str, list[str]] = {metric: [] for metric in metrics}
    cells: list[Row] = []
    for better, worse in pairs:
        row: Row = {"better": better, "worse": worse}
        for metric in metrics:
            if metric in TO_TEACHER and of.line(better).arm == "teacher":
                continue
            difference = paired(figures.of(of.line(better), metric), figures.of(of.line(worse), metric))
            decided = verdict(difference, lower_is_better=metric not in HIGHER_IS_BETTER)
            verdicts[metric].append(decided)
            row[metric] = f"{_interval(difference)}: {decided}" if difference else None
        cells.append(row)
    decisions = [f"{METRICS[metric]}: **{together(each)}**" for metric, each in verdicts.items() if each]
    headings = {"better": "better in the paper", "worse": "worse in the paper"}
    headings |= {metric: f"difference in {METRICS[metric]}" for metric in metrics}
    return [f"The paper's order by {what}, by our {'; by '.join(decisions)}.", table(cells, headings)]


def gap_closed(line: Line, before: Line, goal: Line, figures: Figures, metric: str) -> Summary | None:
    """The share of the way from `before` to `goal` that `line` has come, over seeds that all three have and in which
    there is a way to go."""
    here, start, end = (figures.of(each, metric) for each in (line, before, goal))
    seeds = [seed for seed in sorted(here.keys() & start.keys() & end.keys()) if start[seed] != end[seed]]
    shares = [(start[seed] - here[seed]) / (start[seed] - end[seed]) for seed in seeds]
    return summary(shares) if shares else None


def gaps(of: Table, figures: Figures, before: str, goal: str) -> str:
    """A table of `gap_closed` by the trained students."""
    rows: list[Row] = []
    for line in of.lines:
        if not recipes.ARMS[line.arm].trained:
            continue
        row: Row = {"label": line.label}
        for metric in ("kid", "fid", "kid_to_teacher"):
            share = gap_closed(line, of.line(before), of.line(goal), figures, metric)
            row[metric] = _percent(share) if share else None
        rows.append(row)
    headings = {"label": f"of the gap from “{before}” to “{goal}”"}
    headings |= {metric: f"closed in {METRICS[metric]}" for metric in ("kid", "fid", "kid_to_teacher")}
    return table(rows, headings)


def cell(values: BySeed) -> str | None:
    """ "4.52 ± 0.21 [4.00, 5.04], n = 3"."""
    if not values:
        return None
    of = summary(list(values.values()))
    if of.deviation is None:
        return f"{number(of.mean)}, n = 1"
    return f"{number(of.mean)} ± {number(of.deviation)} [{number(of.low)}, {number(of.high)}], n = {of.n}"


def number(value: float) -> str:
    """Two digits after the point, three where they would say too little."""
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}"


def _interval(of: Summary) -> str:
    return f"{of.mean:+.3g}" + (f" [{of.low:+.3g}, {of.high:+.3g}]" if of.half is not None else f", n = {of.n}")


def _percent(of: Summary) -> str:
    return f"{of.mean:.1%}" + (f" [{of.low:.1%}, {of.high:.1%}]" if of.half is not None else f", n = {of.n}")


def _legend(images: int) -> str:
    return (
        f"Mean ± standard deviation over n seeds [95 % t-interval of the mean], each of {images:,} samples; seeds are"
        " of training and noise, the real images and the teacher's samples are the same for all. KID (it leads) and FID"
        " are on EfficientNet-Lite0 features of 64 px icons; on held-out combinations, a tenth of them, nothing was"
        " trained, the teacher included. Error from the same noise: |latent - the teacher's in 20 steps|^2 over the"
        " latents' variance, on at most 256 captions (0: the same; 2: unrelated). Concept right and coverage (higher is"
        " better): the share of drawings that a classifier names as asked for, and of real drawings that samples come"
        " near. They compare rows, and not with the paper's FID"
        " (Inception) and CLIP score, which stand beside for their order. A pair is decided by its differences seed by"
        " seed: reproduced or reversed if their 95 % t-interval, uncorrected for the number of pairs, leaves out zero,"
        " else not resolved. An order is reproduced if all its pairs are, reversed if one is."
    )


def _floor(of: Mapping[str, float]) -> str:
    return (
        f"For comparison: {of['n']:.0f} real images against as many others have KID x 1e3 {of['kid']:.2f} and FID"
        f" {of['fid']:.1f} (lower, were they more); the teacher's own 20-step samples, against the real ones,"
        f" {of['teacher_kid']:.2f} and {of['teacher_fid']:.1f}, concept right {of['teacher_concept']:.3f} (real"
        f" images {of['real_concept']:.3f})."
    )


def _pending(of: Table, figures: Figures) -> str:
    """Rows and seeds without figures."""
    parts = []
    for line in of.lines:
        lacking = [str(seed) for seed in figures.seeds if seed not in figures.of(line, "kid")]
        if lacking:
            why = "; measured with another recipe" if figures.changed(line) else ""
            parts.append(f"{line.label} (seed {', '.join(lacking)}{why})")
    return "; ".join(parts)
