"""Time of a training step, arm by arm: what each change gives.

    python bench/step.py                        # Sana-0.6B on a GPU, the icons model on a CPU
    python bench/step.py --model tiny --quick
    python bench/step.py --kernels              # on a GPU: `fast` without all, and without each of the fused operators

Rows go to bench/results/step.jsonl.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from rows import append, table
from speed import arms, flops, options
from speed.measure import PHASES, Measured, freed, quiet
from speed.timing import matmul_rate
from tqdm import tqdm

from tbcm.errors import UserError, command
from tbcm.runtime.allocator import reuse_freed_memory
from tbcm.setup.precision import dtype_of

COLUMNS = {
    "arm": "arm",
    "what": "what it changes",
    "method": "method",
    "samples": "samples",
    "median_ms": "ms a step",
    "p20_ms": "20 %",
    "p80_ms": "80 %",
    "in_a_row_ms": "in a row",
    "samples_per_s": "samples/s",
    "speedup": "speed-up",
    "speedup_over": "over",
    "tflop": "TFLOP",
    "tflop_per_s": "TFLOP/s",
    "of_matmul": "of matmul rate",
    **{f"{name}_ms": name for name in PHASES},
    "peak_gib": "allocated GiB",
    "reserved_gib": "reserved GiB",
    "note": "note",
}
Row = dict[str, Any]


def run(
    model: str,
    names: list[str],
    methods: list[str],
    prompts: int,
    points: int,
    steps: int,
    device: torch.device,
    out: Path,
) -> list[Row]:
    """On a GPU arm after arm, as memory is measured too; on a CPU, whose speed drifts, in turns step by step. What is
    measured is written at once."""
    wanted = [(name, method) for method in methods for name in names]
    bar = tqdm(total=len(wanted) * (steps + 2), desc=f"{model} on {device.type}", unit="step", disable=None)
    rows: list[Row] = []
    groups = [wanted] if device.type == "cpu" else [[one] for one in wanted]
    rate = matmul_rate(dtype_of("auto", device), device)
    for group in groups:
        with freed(device):
            found = _group(model, group, prompts, points, steps, device, bar)
        compare(found, rows, rate)
        rows += [append("step", row, out) for row in found]
    bar.close()
    return rows


def _group(
    model: str,
    group: list[tuple[str, str]],
    prompts: int,
    points: int,
    steps: int,
    device: torch.device,
    bar: tqdm[Any],
) -> list[Row]:
    ready: list[tuple[Measured, int | None]] = []
    rows: list[Row] = []
    for name, method in group:
        bar.set_postfix_str(f"{name}, {method}")
        config = arms.config(model, name, method, prompts * (points - 1), points, device)
        try:
            counted = flops.known(config) if device.type == "cuda" else flops.count(config)
            measured = Measured(name, config, device)
            measured.warm_up()
            ready.append((measured, counted))
        except torch.OutOfMemoryError:
            rows.append({"arm": name, "method": method, "model": model, "note": "out of memory"})
        bar.update()
    for _ in range(steps):
        for measured, _ in ready:
            measured.step()
            bar.update()
    for measured, counted in ready:
        if device.type == "cuda":
            measured.steps_in_a_row(steps)
        for _ in range(3):
            measured.step_by_phase()
        bar.update()
        rows.append({"model": model, "what": arms.ARMS[measured.name].what, **measured.row(counted)})
    return rows


def compare(rows: list[Row], before: list[Row], rate: float) -> None:
    """Adds to `rows` the fraction of the measured matmul rate and the ratio to the published arm of the same method, or
    to `fast` where that is not among them and those `before`."""
    measured = [row for row in (*before, *rows) if "samples_per_s" in row]
    base_arm = "published" if any(row["arm"] == "published" for row in measured) else "fast"
    base = {row["method"]: row["samples_per_s"] for row in measured if row["arm"] == base_arm}
    for row in rows:
        if "samples_per_s" not in row:
            continue
        if row["method"] in base:
            row |= {"speedup": row["samples_per_s"] / base[row["method"]], "speedup_over": base_arm}
        row["matmul_tflop_per_s"] = rate
        if "tflop_per_s" in row:
            row["of_matmul"] = row["tflop_per_s"] / rate


def count_flops(model: str, names: list[str], methods: list[str], prompts: int, points: int) -> None:
    """Of steps on a GPU."""
    wanted = [(name, method) for method in methods for name in names]
    for name, method in tqdm(wanted, desc=f"FLOPs of {model}", unit="arm", disable=None):
        flops.count_into(arms.config(model, name, method, prompts * (points - 1), points, torch.device("cuda")))
    print(flops.FILE)


@command
def main() -> None:
    parser = options.parser("step.py", __doc__, ["tbcm"], "published, fast and lean only, 5 steps of each")
    parser.add_argument("--prompts", type=int, help="in a step; default: 1 on CUDA, 8 on a CPU")
    parser.add_argument("--points", type=int, default=16, help="of a route (the first does not train)")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each arm, after warm-up")
    parser.add_argument("--count-flops", action="store_true", help="count them into bench/flops.json, measure nothing")
    parser.add_argument("--kernels", action="store_true", help="what the fused operators give (needs a GPU)")
    arguments = parser.parse_args()
    device, model = options.machine(arguments)
    prompts = arguments.prompts or (1 if device.type == "cuda" else 8)
    if prompts < 1 or arguments.points < 2 or arguments.steps < 2:
        raise UserError("--prompts should be at least 1, --points and --steps at least 2")
    default = [name for name in arms.ARMS if name not in arms.KERNELS and name not in arms.UPDATES]
    if arguments.quick:
        default = ["published", "fast", "lean"]
    if arguments.kernels:
        if arguments.arms or arguments.quick:
            raise UserError("--kernels has arms of its own: leave out --arms and --quick")
        if device.type != "cuda":
            raise UserError("--kernels needs a GPU: on a CPU no kernel runs")
        default = ["fast", *arms.KERNELS]
    names = options.arm_names(arguments, default, [] if device.type == "cuda" else arms.ON_CUDA_ONLY)
    steps = min(arguments.steps, 5) if arguments.quick else arguments.steps
    quiet()
    if arguments.count_flops:
        count_flops(model, arguments.arms or list(arms.ARMS), arguments.methods, prompts, arguments.points)
        return
    reuse_freed_memory()
    rows = run(model, names, arguments.methods, prompts, arguments.points, steps, device, arguments.out)
    shown = {key: name for key, name in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    print(table(rows, shown))


if __name__ == "__main__":
    sys.exit(main())
