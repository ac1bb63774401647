"""Peak memory of a training step against the number of samples that it optimises, and against the route's length.

    python bench/memory.py                          # Sana-0.6B on a GPU, the icons model on a CPU
    python bench/memory.py --model sana-600m --device cpu --quick

On a GPU it is measured. On a CPU it is accounted: the live tensors of an eager step, run on tensors without data in the
precision that a GPU would take; workspaces and fragmentation are not in it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from rows import append, table
from speed import arms, options
from speed.measure import Measured, freed, parts, quiet
from tqdm import tqdm

from tbcm.config import Config
from tbcm.errors import UserError, command
from tbcm.runtime.files import atomic_path
from tbcm.training.accounting import CostCounter, SizesAlone
from tbcm.training.dryrun import as_on_a_gpu, eager
from tbcm.training.holdings import holdings
from tbcm.training.trainer import Trainer

SAMPLES = [1, 2, 4, 8, 15, 30, 60]
POINTS = [8, 12, 16, 20]
COLUMNS = {
    "arm": "arm",
    "method": "method",
    "points": "route points",
    "samples": "samples",
    "peak_gib": "peak GiB",
    "reserved_gib": "reserved GiB",
    "base_gib": "base GiB",
    "dynamic_gib": "dynamic GiB",
    "weights_gib": "weights",
    "gradients_gib": "gradients",
    "optimizer_gib": "optimiser and EMA",
    "note": "note",
}
NETWORKS = ["teacher", "student", "text encoder", "VAE"]
Row = dict[str, Any]


def measured(arm: str, config: Config, device: torch.device) -> Row:
    """Of the third step, by CUDA's allocator."""
    made = Measured(arm, config, device)
    made.warm_up()
    made.step()
    peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    base = torch.cuda.memory_allocated(device) + holdings(made.trainer)["gradients"]
    return _row(made.trainer, peak, base) | {"reserved_gib": reserved / 2**30, "accounted": False}


def accounted(arm: str, config: Config, device: torch.device) -> Row:
    """Of the first step, by the sizes of its live tensors."""
    config = as_on_a_gpu(eager(config))
    with SizesAlone(), CostCounter() as counter:
        trainer = Trainer(config, device, parts(config, device))
        counter.peak = counter.live  # making them may take more than keeping them
        base = counter.live + holdings(trainer)["gradients"]
        trainer.train_step()
    return _row(trainer, counter.peak, base) | {"accounted": True}


def _row(trainer: Trainer, peak: int, base: int) -> Row:
    held = holdings(trainer)
    weights, gradients = (sum(held[name] for name in names) for names in (NETWORKS, ["gradients"]))
    return {
        "samples": trainer.method.samples_per_step,
        "points": trainer.config.method.points,
        "peak_gib": peak / 2**30,
        "base_gib": base / 2**30,
        "dynamic_gib": (peak - base) / 2**30,
        "weights_gib": weights / 2**30,
        "gradients_gib": gradients / 2**30,
        "optimizer_gib": (base - weights - gradients) / 2**30,
    }


def run(model: str, wanted: list[tuple[str, str, int, int]], device: torch.device, out: Path) -> list[Row]:
    """Rows of (arm, method, samples, route points); one that does not fit is a row that says so."""
    rows = []
    for arm, method, samples, points in tqdm(wanted, desc=f"{model} on {device.type}", unit="row", disable=None):
        # What a GPU would be given; there it is measured, elsewhere accounted.
        config = arms.config(model, arm, method, samples, points, torch.device("cuda"))
        row: Row = {"model": model, "arm": arm, "method": method, "samples": samples, "points": points}
        with freed(device):
            try:
                row |= (measured if device.type == "cuda" else accounted)(arm, config, device)
            except torch.OutOfMemoryError:
                row["note"] = "out of memory"
        rows.append(append("memory", row, out))
    return rows


def plot(rows: list[Row], path: Path) -> None:
    """Peak memory against samples, a curve per arm and method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), constrained_layout=True)
    for method, arm in dict.fromkeys((row["method"], row["arm"]) for row in rows):
        of_arm = [row for row in rows if (row["method"], row["arm"]) == (method, arm)]
        curve = sorted((row["samples"], row["peak_gib"]) for row in of_arm)
        line = "-" if method == "tbcm" else "--"
        axes.plot(*zip(*curve, strict=True), marker="o", linestyle=line, label=f"{method}, {arm}")
    axes.set(
        xlabel="samples optimised in a step",
        ylabel="peak memory, GiB" + (" (accounted, eager)" if rows[0].get("accounted") else ""),
        title=f"{rows[0]['model']} on {rows[0]['gpu'] or 'a CPU'}, torch {rows[0]['torch']}",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with atomic_path(path) as part:
        figure.savefig(part, dpi=150, format="png")
    pyplot.close(figure)


@command
def main() -> None:
    parser = options.parser("memory.py", __doc__, ["tbcm", "scm"], "published and lean only, few batches")
    parser.add_argument("--rows-only", action="store_true", help="draw no picture (which needs matplotlib)")
    arguments = parser.parse_args()
    device, model = options.machine(arguments)
    measures, few = device.type == "cuda", ["published", "lean"]
    many = [*few, "selective", "fast" if measures else "no_recompute"]
    # An accounted step is eager: what a compiler or a graph does is not in it.
    same = [] if measures else arms.ON_CUDA_ONLY - {"half_weights", "adamw"}
    names = options.arm_names(arguments, few if arguments.quick else many, same)
    quiet()
    counts, routes = ([1, 15], [16]) if arguments.quick else (SAMPLES, POINTS)
    wanted = [(arm, method, n, 16) for method in arguments.methods for arm in names for n in counts]
    if "tbcm" in arguments.methods:
        wanted += [(arm, "tbcm", points - 1, points) for arm in names for points in routes if points != 16]
    rows = run(model, wanted, device, arguments.out)
    batches = rows[: len(arguments.methods) * len(names) * len(counts)]
    if not any("peak_gib" in row for row in batches):
        raise UserError("nothing fitted into memory: choose a smaller --model")
    print(table(rows, {key: name for key, name in COLUMNS.items() if any(row.get(key) is not None for row in rows)}))
    if not arguments.rows_only:
        picture = arguments.out / f"memory-{model}-{device.type}.png"
        plot([row for row in batches if "peak_gib" in row], picture)
        print(f"picture: {picture}")


if __name__ == "__main__":
    sys.exit(main())
