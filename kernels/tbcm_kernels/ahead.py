"""Compiles every kernel ahead of time, forward and backward, without a GPU, and lists what each takes.

python -m tbcm_kernels.ahead --arch 80 90
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from tbcm_kernels.catalog import JOINT, SANA, Operator, Size, size_of
from tbcm_kernels.launch import Compiled, compile_ahead
from tbcm_kernels.registry import OPERATORS

SIZES = {name: size_of(name, points=2) for name in (*SANA, *JOINT)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compile_operator(
    operator: Operator, size: Size, dtype: torch.dtype, archs: Iterable[int], *, tangents: bool
) -> list[Compiled]:
    """All kernels of a call and of its backward pass, at this size and dtype of activations."""
    # Small, but with rows of as many tokens as a kernel takes at once of real images.
    arguments = operator.inputs(replace(size, rows=8, columns=8), dtype, torch.device("cpu"), tangents)
    with compile_ahead(*archs) as made:
        outputs = [y for y in tensors(operator.run(*arguments)) if y.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.zeros_like(y) for y in outputs])
    return list(made)


def tensors(tree: object) -> Iterator[Tensor]:
    """Those in nested tuples."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for branch in tree:
            yield from tensors(branch)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tbcm_kernels.ahead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", nargs="+", type=int, default=[80, 90], help="compute capabilities (default: 80 90)")
    parser.add_argument("--model", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bf16"], help="of activations")
    parser.add_argument("--operator", nargs="+", choices=list(OPERATORS), default=list(OPERATORS))
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels that are interpreted cannot be compiled; unset it")
    print(f"{'operator':24} {'kernel':36} {'model':11} {'dtype':5} arch  shared KiB  cubin KiB  registers  spilled")
    for name, model, dtype in product(options.operator, options.model, options.dtype):
        operator, seen = OPERATORS[name], set[Compiled]()
        if model not in operator.models:
            continue
        for tangents in (False, True)[: 1 + operator.has_tangents]:
            seen.update(compile_operator(operator, SIZES[model], DTYPES[dtype], options.arch, tangents=tangents))
        for made in sorted(seen, key=lambda made: (made.arch, made.kernel, made.shared)):
            sizes = f"{made.shared / 1024:10.1f} {made.cubin / 1024:10.1f} {made.registers:10} {made.spilled:8}"
            print(f"{name:24} {made.kernel:36} {model:11} {dtype:5} {made.arch:4}  {sizes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
