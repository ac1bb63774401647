"""What a call of a fused operator costs the host, in microseconds, called one by one and from compiled code.

    python bench/launches.py                                        # every operator, some minutes
    python bench/launches.py --operators norm_modulate glu_depthwise
    python bench/launches.py --block sana-600m --samples 15         # what a student's compiled block launches

Without a GPU one is pretended (tests/pretended_launches.py): the host does all that it does on a real one, but for the
launch itself, and kernels compute nothing. `mm` is torch.mm of two small matrices of the CPU in the same process, what
the others are compared with. Microseconds are the processor's, so other work on the machine changes little.

A call's cost is what each further call adds to a function of several, its tensors' allocations among it: of the eager
function with autograd's work, of the compiled one within the code that inductor made. Rows go to
bench/results/launches.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rows import RESULTS, Row, append, table
from tbcm_kernels.ahead import tensors
from tbcm_kernels.catalog import Operator, size_of
from tbcm_kernels.registry import OPERATORS
from torch._inductor.graph import GraphLowering

from speed.block import StudentBlock, generated_code
from tbcm.models.sana.presets import SANA

MORE = 4
"""Calls that one function has more than the other."""
TAKES, REPEATS = 12, 20


class Clock:
    """Microseconds of the processor that repeated calls of a function take, or the parts of it that are `timed`."""

    def __init__(self) -> None:
        self.spent: float | None = None

    def timed(self, part: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.process_time()
            result = part(*arguments)
            self.spent = (self.spent or 0.0) + time.process_time() - start
            return result

        return run

    def __call__(self, *functions: Callable[[], object]) -> list[float]:
        """Of each the least of TAKES, which the functions have in turns; a take is the mean of REPEATS calls."""
        for function in functions:
            function()
        takes: list[list[float]] = [[] for _ in functions]
        gc.collect()
        gc.disable()
        for _ in range(TAKES):
            for function, found in zip(functions, takes, strict=True):
                self.spent, start = None, time.process_time()
                for _ in range(REPEATS):
                    function()
                whole = time.process_time() - start
                found.append((whole if self.spent is None else self.spent) / REPEATS * 1e6)
        gc.enable()
        return [min(found) for found in takes]


@contextmanager
def generated_code_is_timed(clock: Clock) -> Iterator[None]:
    """Inside, of what is compiled `clock` times the code that inductor makes, without what surrounds it in PyTorch: a
    network has that once for a block of many operators."""
    compile_to_module: Any = GraphLowering.compile_to_module

    def compiled(graph: GraphLowering) -> Any:
        module = compile_to_module(graph)
        module.call = clock.timed(module.call)
        return module

    GraphLowering.compile_to_module = compiled  # type: ignore[method-assign, assignment]
    try:
        with torch._inductor.config.patch(force_disable_caches=True):
            yield
    finally:
        GraphLowering.compile_to_module = compile_to_module  # type: ignore[method-assign]


def cost(operator: Operator, *, dual: bool, backward: bool, compiled: bool) -> float:
    """Microseconds that a further call takes."""
    size, clock = size_of(operator.models[0], points=2, pixels=256), Clock()
    arguments = [operator.inputs(size, torch.bfloat16, torch.device("cuda"), dual) for _ in range(1 + MORE)]

    def forward(given: list[tuple[Any, ...]]) -> list[torch.Tensor]:
        return [y for each in given for y in tensors(operator.run(*each))]

    function = torch.compile(forward, fullgraph=True, dynamic=False) if compiled else forward

    def call(count: int) -> None:
        with torch.set_grad_enabled(backward):
            outputs = [y for y in function(arguments[:count]) if y.requires_grad]
        if backward:
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
            for leaf in tensors(tuple(arguments)):
                leaf.grad = None

    with generated_code_is_timed(clock):
        one, many = clock(lambda: call(1), lambda: call(1 + MORE))
    return (many - one) / MORE


def of_operators(names: list[str], out: Path) -> list[Row]:
    a, b = torch.randn(2, 16, 16)
    rows = []
    for name in names:
        operator = OPERATORS[name]
        for dual in (False, True)[: 1 + operator.has_tangents]:
            row: Row = {"operator": name, "tangents": dual}
            for backward in (False, True)[: 1 + (operator.backward_cost is not None)]:
                for compiled in (False, True):
                    torch._dynamo.reset()
                    key = f"forward{' + backward' * backward}, {'compiled' if compiled else 'eager'}"
                    row[key] = cost(operator, dual=dual, backward=backward, compiled=compiled)
            (row["mm"],) = Clock()(lambda: torch.mm(a, b))
            rows.append(append("launches", row, out))
    return rows


def of_a_block(model: str, samples: int, out: Path) -> list[Row]:
    """What it launches, forward and backward."""
    with generated_code() as made:
        StudentBlock(model, samples, 1, 32)()
    return [
        append(
            "launches",
            {
                "block": model,
                "samples": samples,
                "pass": "backward" if code.backward else "forward",
                "ours": code.ours,
                "inductor's": code.fused,
                "products": code.products,
                "operators": code.operators,
                "GB": code.bytes / 1e9,
            },
            out,
        )
        for code in made
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python bench/launches.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operators", nargs="+", choices=list(OPERATORS), default=list(OPERATORS))
    parser.add_argument("--block", choices=list(SANA), help="count what a compiled block of this student launches")
    parser.add_argument("--samples", type=int, default=15, help="of the block (default: 15), at 1024 pixels")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows (default: bench/results)")
    options = parser.parse_args()
    if options.block:
        rows = of_a_block(options.block, options.samples, options.out)
        names = ["pass", "ours", "inductor's", "products", "operators", "GB"]
    else:
        rows = of_operators(options.operators, options.out)
        passes = [f"{one}, {way}" for one in ("forward", "forward + backward") for way in ("eager", "compiled")]
        names = ["operator", "tangents", *passes, "mm"]
    print(table(rows, dict(zip(names, names, strict=True))))
    return 0
