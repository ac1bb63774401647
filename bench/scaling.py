"""How a training step scales over ranks (weak scaling: the same prompts on each), and what it should do on a cluster.

    python bench/scaling.py                              # 1 and 2 ranks; Sana-0.6B on GPUs, the icons model on a CPU
    python bench/scaling.py --model tiny --ranks 1 2 4 --quick
    python bench/scaling.py --predict                    # a model of 4 nodes x 8 GPUs: nothing is measured

Within a run the arms take turns step by step: one rank by itself; every mode; every mode without its exchange, while as
many ranks do the same work. The last two differ in *exposed* communication: what a step takes longer because it waits
for the exchange. Rows go to bench/results/scaling.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rows import RESULTS, append, table
from speed import arms, cluster, on_ranks, options
from speed.collectives import KINDS
from speed.on_ranks import SINGLE, Task, without
from torch.multiprocessing import ProcessRaisedException
from tqdm import tqdm

from tbcm.config.paths import path_argument
from tbcm.errors import UserError, command
from tbcm.runtime.spread import spread

COLUMNS = {
    "model": "model",
    "ranks": "ranks",
    "mode": "mode",
    "samples": "samples",
    "median_ms": "ms a step",
    "p20_ms": "20 %",
    "p80_ms": "80 %",
    "samples_per_s": "samples/s",
    "efficiency": "efficiency",
    "efficiency_without_exchange": "without exchange",
    "exposed_ms": "exposed ms",
    "exposed_p20_ms": "20 %",
    "exposed_p80_ms": "80 %",
    "collectives": "collectives",
    **{f"{kind}_bytes": f"{kind.replace('_', '-')}, bytes" for kind in KINDS},
}
Row = dict[str, Any]


def run(task: Task, world: int) -> list[Row]:
    """Of `world` ranks, and of one beside them."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        try:
            on_ranks.run(task, world, result)
        except ProcessRaisedException as error:
            if "OutOfMemoryError" not in str(error):
                raise
            raise UserError(f"{task.model} does not fit, {2 * len(task.modes) + 1} times: take fewer --modes") from None
        return rows_of(task, world, json.loads(result.read_text()))


def rows_of(task: Task, world: int, measured: dict[str, Any]) -> list[Row]:
    """From what `on_ranks.run` wrote. Arms are compared step by step, so that drift of the machine cancels."""
    seconds: dict[str, list[float]] = measured["seconds"]
    single = seconds[SINGLE]
    rows = [_row(task, 1, SINGLE, single) | {"beside_ranks": world, "efficiency": 1.0}]
    for mode in task.modes if world > 1 else ():
        step, silent = seconds[mode], seconds[without(mode)]
        exposed = [1000 * (a - b) for a, b in zip(step, silent, strict=True)]
        traffic = measured["traffic"][mode]
        rows.append(
            _row(task, world, mode, step)
            | {
                "efficiency": _median_ratio(single, step),
                "efficiency_without_exchange": _median_ratio(single, silent),
                "without_exchange_ms": 1000 * statistics.median(silent),
                **_spread("exposed", exposed),
                "collectives": sum(count for count, _ in traffic.values()),
                **{f"{kind}_bytes": round(size) for kind, (_, size) in traffic.items()},
            }
        )
    return rows


def _row(task: Task, ranks: int, mode: str, seconds: list[float]) -> Row:
    samples = ranks * task.prompts * (task.points - 1)
    spread = _spread("", [1000 * value for value in seconds])
    return {
        "model": task.model,
        "modelled": False,
        "device": task.device_type,
        "ranks": ranks,
        "mode": mode,
        "prompts_per_rank": task.prompts,
        "points": task.points,
        "samples": samples,
        "steps": len(seconds),
        **spread,
        "samples_per_s": 1000 * samples / spread["median_ms"],
    }


def _spread(name: str, values: list[float]) -> dict[str, float]:
    middle, low, high = spread(values)
    median = f"{name}_ms" if name else "median_ms"
    prefix = f"{name}_" if name else ""
    return {median: middle, f"{prefix}p20_ms": low, f"{prefix}p80_ms": high}


def _median_ratio(above: Iterable[float], below: Iterable[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python bench/scaling.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(arms.MODELS), help="default: sana-600m, on a CPU icons")
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2], help="one is measured beside any number")
    parser.add_argument("--modes", nargs="+", choices=["ddp", "fsdp"], default=["ddp", "fsdp"])
    parser.add_argument("--prompts", type=int, help="of each rank in a step; default: 1 on CUDA, 2 on a CPU")
    parser.add_argument("--points", type=int, default=16, help="of a route (the first does not train)")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each arm, after warm-up")
    parser.add_argument("--quick", action="store_true", help="5 steps of each")
    parser.add_argument("--out", type=path_argument, default=RESULTS, help="folder of what is written")
    parser.add_argument("--predict", action="store_true", help="only the model of a cluster; all below is for it")
    cluster.add_arguments(parser)
    return parser.parse_args()


@command
def main() -> None:
    arguments = parse()
    if arguments.predict:
        cluster.main(arguments)
        return
    device, model = options.machine(arguments)
    if min(arguments.ranks) < 1 or (arguments.prompts or 1) < 1 or arguments.points < 2 or arguments.steps < 2:
        raise UserError("--ranks and --prompts should be at least 1, --points and --steps at least 2")
    if device.type == "cuda" and max(arguments.ranks) > torch.cuda.device_count():
        raise UserError(
            f"--ranks {max(arguments.ranks)}: there are {torch.cuda.device_count()} GPUs here, one for each"
        )
    steps = min(arguments.steps, 5) if arguments.quick else arguments.steps
    prompts = arguments.prompts or (1 if device.type == "cuda" else 2)
    task = Task(model, list(dict.fromkeys(arguments.modes)), prompts, arguments.points, steps, device.type)
    if device.type == "cpu":
        torch.set_num_threads(1)  # as in each rank; rows say so
    rows = []
    worlds = sorted(set(arguments.ranks) - {1}) or [1]
    for world in tqdm(worlds, desc=f"{model} on {device.type}", unit="run", disable=None):
        rows += [append("scaling", row, arguments.out) for row in run(task, world)]
    print(table(rows, {key: name for key, name in COLUMNS.items() if any(row.get(key) is not None for row in rows)}))


if __name__ == "__main__":
    sys.exit(main())
