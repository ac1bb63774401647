"""torch.compile, as networks here use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch

from tbcm.config.resolution import MOST_SIZES
from tbcm.models.differentiation.fold import fold_options

F = TypeVar("F", bound=Callable[..., object])

KINDS = 16
"""Of calls that each have a graph of their own: teacher and student, training and previews, full and last batches."""


def compiled(fn: F, *, fold: bool) -> F:
    """`fn`, compiled whole, once for each size of images and kind of call.

    Args:
        fold: without the products with zero tangents that `torch.func.jvp` makes.
    """
    config, most = torch._dynamo.config, KINDS * MOST_SIZES
    config.optimize_ddp = False  # would cut blocks where DDP's buckets end
    config.recompile_limit = max(most, config.recompile_limit)
    config.accumulated_recompile_limit = max(most, config.accumulated_recompile_limit)
    options = fold_options() if fold else None
    return cast("F", torch.compile(fn, fullgraph=True, dynamic=False, options=options))
