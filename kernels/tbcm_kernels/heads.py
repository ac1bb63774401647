"""How attention's kernels cut up a head, and their matrix products."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tbcm_kernels import dispatch
from tbcm_kernels.launch import jit, tl, triton, wide


class Head(NamedTuple):
    """How kernels cut up a head of `dim` columns: into `main` columns, a power of two, and `rest` more, the last of
    which may be masked. 72 becomes 64 + 16, a third less work than 128. In fp32 no part is wider than 64, as products
    of fp32 keep their operands in registers."""

    dim: int
    main: int
    rest: int

    @classmethod
    def of(cls, dim: int, dtype: torch.dtype) -> Head:
        whole = max(16, triton.next_power_of_2(dim))
        rest = max(16, triton.next_power_of_2(max(dim - whole // 2, 1)))
        if whole // 2 + rest < whole or (whole > 64 and not is_half(dtype)):
            return cls(dim, whole // 2, rest)
        return cls(dim, whole, 0)


def is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def product_types(dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments: the type of sums, and that of factors, of products in `dtype`. In the interpreter, whose
    half-precision products are wrong, factors are wide too."""
    types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return {"WIDE": wide(dtype), "DOT": wide(dtype) if dispatch.mode() == "interpret" else types[dtype]}


def with_rows(x: Tensor) -> Tensor:
    """x, or a copy of it whose rows are contiguous as kernels take them."""
    return x if x.stride(-1) == 1 else x.contiguous()


@jit
def _columns(width, count, BLOCK: tl.constexpr, OFFSET: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr):
    """Offsets and mask of [BLOCK, SIZE] columns from OFFSET of rows `width` apart: no more than `count` rows, and DIM
    columns."""
    rows = tl.arange(0, BLOCK)[:, None]
    columns = OFFSET + tl.arange(0, SIZE)[None, :]
    mask = rows < count
    if OFFSET + SIZE > DIM:
        mask = mask & (columns < DIM)
    return rows * width + columns, mask


@jit
def load_head(base, width, count, BLOCK: tl.constexpr, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
              DTYPE: tl.constexpr):  # fmt: skip
    """Both parts of BLOCK rows of a head (where there is no rest: the main part twice), zero outside."""
    offsets, mask = _columns(width, count, BLOCK, 0, MAIN, DIM)
    main = tl.load(base + offsets, mask=mask, other=0.0).to(DTYPE)
    rest = main
    if REST > 0:
        offsets, mask = _columns(width, count, BLOCK, MAIN, REST, DIM)
        rest = tl.load(base + offsets, mask=mask, other=0.0).to(DTYPE)
    return main, rest


@jit
def store_head(base, width, count, main, rest, BLOCK: tl.constexpr, DIM: tl.constexpr, MAIN: tl.constexpr,
               REST: tl.constexpr):  # fmt: skip
    """The reverse of `load_head`."""
    offsets, mask = _columns(width, count, BLOCK, 0, MAIN, DIM)
    tl.store(base + offsets, main, mask=mask)
    if REST > 0:
        offsets, mask = _columns(width, count, BLOCK, MAIN, REST, DIM)
        tl.store(base + offsets, rest, mask=mask)


@jit
def zero_head(BLOCK: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, WIDE: tl.constexpr):
    """Sums for both parts."""
    main = tl.zeros([BLOCK, MAIN], WIDE)
    rest = main
    if REST > 0:
        rest = tl.zeros([BLOCK, REST], WIDE)
    return main, rest


@jit
def inner(a, a_rest, b, b_rest, REST: tl.constexpr, WIDE: tl.constexpr):
    """a b^T: a sum over both parts."""
    out = tl.dot(a, tl.trans(b), out_dtype=WIDE, input_precision="ieee")
    if REST > 0:
        out = tl.dot(a_rest, tl.trans(b_rest), out, out_dtype=WIDE, input_precision="ieee")
    return out


@jit
def outer(weights, x, x_rest, main, rest, REST: tl.constexpr, WIDE: tl.constexpr):
    """Sums plus `weights` x, in both parts."""
    main = tl.dot(weights, x, main, out_dtype=WIDE, input_precision="ieee")
    if REST > 0:
        rest = tl.dot(weights, x_rest, rest, out_dtype=WIDE, input_precision="ieee")
    return main, rest
