"""Time of a training step, arm by arm: what each change gives.

    python bench/step.py                        # Sana-0.6B on a GPU, the icons model on a CPU
    python bench/step.py --model tiny --quick
    python bench/step.py --kernels              # on a GPU: `fast` without all, and without each of the fused operators

Rows go to bench/results/step.jsonl.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from rows import append, table
from speed import arms, options
from speed.measure import PHASES, Measured, flops_of, freed, quiet
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
    "samples_per_s": "samples/s",
    "speedup": "speed-up",
    "speedup_over": "over",
    "tflop": "TFLOP",
    "tflop_per_s": "TFLOP/s",
    "of_matmul": "of matmul rate",
    **{f"{name}_ms": name for name in PHASES},
    "peak_gib": "peak GiB",
    "note": "note",
}
Row = dict[str, Any]


def run(
    model: str, names: list[str], methods: list[str], prompts: int, points: int, steps: int, device: torch.device
) -> list[Row]:
    """On a GPU arm after arm, as memory is measured too; on a CPU, whose speed drifts, in turns step by step."""
    wanted = [(name, method) for method in methods for name in names]
    bar = tqdm(total=len(wanted) * (steps + 2), desc=f"{model} on {device.type}", unit="step", disable=None)
    rows: list[Row] = []
    groups = [wanted] if device.type == "cpu" else [[one] for one in wanted]
    for group in groups:
        with freed(device):
            rows += _group(model, group, prompts, points, steps, device, bar)
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
    ready: list[tuple[Measured, int]] = []
    rows: list[Row] = []
    for name, method in group:
        bar.set_postfix_str(f"{name}, {method}")
        config = arms.config(model, name, method, prompts * (points - 1), points, device)
        try:
            flops = flops_of(config)
            measured = Measured(name, config, device)
            measured.warm_up()
            ready.append((measured, flops))
        except torch.OutOfMemoryError:
            rows.append({"arm": name, "method": method, "model": model, "note": "out of memory"})
        bar.update()
    for _ in range(steps):
        for measured, _ in ready:
            measured.step()
            bar.update()
    for measured, flops in ready:
        for _ in range(3):
            measured.step_by_phase()
        bar.update()
        rows.append({"model": model, "what": arms.ARMS[measured.name].what, **measured.row(flops)})
    return rows


def compare(rows: list[Row], rate: float) -> list[Row]:
    """Adds the fraction of the measured matmul rate and the ratio to the published arm of the same method, or to `fast`
    where that is not among them."""
    base_arm = "published" if any(row["arm"] == "published" for row in rows) else "fast"
    published = {row["method"]: row.get("samples_per_s") for row in rows if row["arm"] == base_arm}
    for row in rows:
        if "samples_per_s" not in row:
            continue
        if base := published.get(row["method"]):
            row |= {"speedup": row["samples_per_s"] / base, "speedup_over": base_arm}
        row["matmul_tflop_per_s"] = rate
        row["of_matmul"] = row["tflop_per_s"] / rate
    return rows


@command
def main() -> None:
    parser = options.parser("step.py", __doc__, ["tbcm"], "published, fast and lean only, 5 steps of each")
    parser.add_argument("--prompts", type=int, help="in a step; default: 1 on CUDA, 8 on a CPU")
    parser.add_argument("--points", type=int, default=16, help="of a route (the first does not train)")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each arm, after warm-up")
    parser.add_argument("--kernels", action="store_true", help="what the fused operators give (needs a GPU)")
    arguments = parser.parse_args()
    device, model = options.machine(arguments)
    prompts = arguments.prompts or (1 if device.type == "cuda" else 8)
    if prompts < 1 or arguments.points < 2 or arguments.steps < 2:
        raise UserError("--prompts should be at least 1, --points and --steps at least 2")
    default = [name for name in arms.ARMS if name not in arms.KERNELS]
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
    reuse_freed_memory()
    rows = run(model, names, arguments.methods, prompts, arguments.points, steps, device)
    rate = matmul_rate(dtype_of("auto", device), device)
    rows = [append("step", row, arguments.out) for row in compare(rows, rate)]
    shown = {key: name for key, name in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    print(table(rows, shown))


if __name__ == "__main__":
    sys.exit(main())
