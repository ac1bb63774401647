"""Time of each fused operator against the same in plain PyTorch, eager and compiled, at its models' sizes.

    python bench/kernels.py                                   # on a GPU: everything, some minutes
    python bench/kernels.py --operators norm_modulate --models sana-600m --pixels 1024 --samples 15

Bandwidth counts each tensor that must be read or written once. `of copy` is the time of a copy that moves as many
bytes, in the same harness, over the operator's own. Without a GPU there is no kernel to time, and PyTorch's two ways
are, for images of 128 pixels (`python -m tbcm_kernels.ahead` compiles the kernels without one). Rows go to
bench/results/kernels.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from rows import RESULTS, append, table
from tbcm_kernels import dispatch
from tbcm_kernels.ahead import tensors
from tbcm_kernels.catalog import JOINT, SANA, Cost, Operator, Size, size_of
from tbcm_kernels.registry import OPERATORS
from torch import Tensor
from tqdm import tqdm

from speed.measure import freed
from speed.timing import Clock, matmul_rate
from tbcm.config.paths import path_argument
from tbcm.errors import UserError, command
from tbcm.runtime.distributed import pick_device
from tbcm.setup.precision import dtype_of

POINTS = 15
WAYS = ["kernel", "eager", "compiled"]
COLUMNS = {
    "operator": "operator",
    "variant": "variant",
    "direction": "pass",
    "model": "model",
    "pixels": "px",
    "samples": "samples",
    "way": "way",
    "median_ms": "ms",
    "gb_per_s": "GB/s",
    "of_copy": "of copy",
    "tflop_per_s": "TFLOP/s",
    "of_matmul": "of matmul",
    "peak_mib": "peak MiB",
    "note": "note",
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """An operator at a size: `tangents` or plain, forward or backward."""

    operator: Operator
    model: str
    pixels: int
    samples: int
    tangents: bool
    backward: bool

    @property
    def size(self) -> Size:
        prompts, points = max(1, self.samples // POINTS), min(self.samples, POINTS)
        return size_of(self.model, prompts, points, self.pixels)

    def row(self) -> Row:
        return {
            "operator": self.operator.name,
            "variant": "dual" if self.tangents else "plain",
            "direction": "backward" if self.backward else "forward",
            "model": self.model,
            "pixels": self.pixels,
            "samples": self.samples,
        }


def cases(names: list[str], models: list[str], pixels: list[int], samples: list[int]) -> Iterator[Case]:
    """Of each operator in those of the models that have it. A dual operator's backward pass is the plain one's."""
    for name, model, px, count in product(names, models, pixels, samples):
        operator = OPERATORS[name]
        if model not in operator.models:
            continue
        yield Case(operator, model, px, count, tangents=False, backward=False)
        if operator.has_tangents:
            yield Case(operator, model, px, count, tangents=True, backward=False)
        if operator.backward_cost:
            yield Case(operator, model, px, count, tangents=False, backward=True)


def measure(
    case: Case, dtype: torch.dtype, device: torch.device, clock: Clock, rate: float, wanted: list[str]
) -> list[Row]:
    """A row for each of the `wanted` ways to run the case."""
    torch.manual_seed(0)
    facts = case.row() | {"dtype": str(dtype).removeprefix("torch.")}
    count = case.operator.backward_cost if case.backward else case.operator.cost
    assert count is not None
    try:
        arguments = case.operator.inputs(case.size, dtype, device, case.tangents)
        cost = count(*arguments)
        copy = clock(copy_of(cost.bytes, device)).median
    except torch.OutOfMemoryError:
        return [facts | {"note": "out of memory"}]
    rows = []
    for way, function in ways(case.operator, device).items():
        if way not in wanted:
            continue
        row = facts | {"way": way}
        with freed(device):
            try:
                rows.append(row | figures(work(function, arguments, case.backward), cost, copy, device, clock, rate))
            except torch.OutOfMemoryError:
                rows.append(row | {"note": "out of memory"})
    return rows


def ways(operator: Operator, device: torch.device) -> dict[str, Callable[..., Any]]:
    torch.compiler.reset()
    known = {"eager": operator.reference, "compiled": torch.compile(operator.reference, dynamic=False)}
    return {"kernel": operator.run, **known} if device.type == "cuda" else known


def work(function: Callable[..., Any], arguments: tuple[Any, ...], backward: bool) -> Callable[[], Any]:
    """What is timed: a call without a graph, or the backward pass of one."""
    if not backward:
        return torch.no_grad()(lambda: function(*arguments))
    outputs = [y for y in tensors(function(*arguments)) if y.requires_grad]
    leaves = [x for x in tensors(arguments) if x.requires_grad]
    gradients = [torch.randn_like(y) for y in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True, allow_unused=True)


def copy_of(nbytes: int, device: torch.device) -> Callable[[], Tensor]:
    """A copy that reads half of the bytes and writes the other half."""
    source, target = (torch.empty(max(1, nbytes // 2), dtype=torch.int8, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def figures(
    function: Callable[[], Any], cost: Cost, copy: float, device: torch.device, clock: Clock, rate: float
) -> Row:
    times = clock(function)
    row = {
        "median_ms": times.median,
        "p20_ms": times.p20,
        "p80_ms": times.p80,
        "bytes": cost.bytes,
        "flops": cost.flops,
        "gb_per_s": cost.bytes / times.median / 1e6,
        "of_copy": copy / times.median,
        "copy_ms": copy,
        "tflop_per_s": cost.flops / times.median / 1e9,
        "of_matmul": cost.flops / times.median / 1e9 / rate,
    }
    if device.type != "cuda":
        return row
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return row | {"peak_mib": (torch.cuda.max_memory_allocated(device) - before) / 2**20}


@command
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python bench/kernels.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operators", nargs="+", choices=list(OPERATORS), default=list(OPERATORS), metavar="NAME")
    parser.add_argument("--models", nargs="+", choices=[*SANA, *JOINT], default=[*SANA, *JOINT])
    parser.add_argument("--pixels", nargs="+", type=int, choices=[512, 1024], default=[512, 1024])
    parser.add_argument("--samples", nargs="+", type=int, default=[15, 60, 120], help="1 to 15, or a multiple of 15")
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="default: all that there are here")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="all but Sana-1.6B, at 1024 px, 15 samples, 20 repeats")
    parser.add_argument("--out", type=path_argument, default=RESULTS, help="folder of the rows")
    options = parser.parse_args()
    if wrong := [n for n in options.samples if n < 1 or (n > POINTS and n % POINTS)]:
        raise UserError(f"--samples {wrong[0]}: give 1 to {POINTS} points of a prompt, or a multiple of {POINTS}")
    if options.repeats < 2:
        raise UserError(f"--repeats {options.repeats}: give at least 2")
    device = pick_device(options.device)
    if device.type == "cuda" and dispatch.mode() == "off":
        raise UserError("the environment has TBCM_KERNELS=off: unset it, there would be nothing to time")
    if options.quick:
        options.models = [*SANA[:1], *JOINT]
        options.pixels, options.samples, options.repeats = [1024], [15], 20
    if device.type == "cpu":
        options.pixels = [128]
    dtype, clock = dtype_of("auto", device), Clock(device, options.repeats)
    rate = matmul_rate(dtype, device)
    rows: list[Row] = []
    todo = list(cases(options.operators, options.models, options.pixels, options.samples))
    if not todo:
        raise UserError(f"--models {' '.join(options.models)}: {' and '.join(options.operators)} is of other models")
    for case in tqdm(todo, desc=f"operators on {device.type}", unit="case", disable=None):
        with clock.on_a_stream(), freed(device):
            rows += [
                append("kernels", row, options.out) for row in measure(case, dtype, device, clock, rate, options.ways)
            ]
    print(table(rows, {key: name for key, name in COLUMNS.items() if any(row.get(key) is not None for row in rows)}))


if __name__ == "__main__":
    sys.exit(main())
