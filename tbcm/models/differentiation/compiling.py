"""torch.compile, as networks here use it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import tbcm_kernels
import torch
import torch.compiler.config
from torch._dynamo.exc import TorchDynamoException

from tbcm.config.resolution import MOST_SIZES
from tbcm.errors import first_line
from tbcm.models.differentiation.fold import fold_options

logger = logging.getLogger(__name__)

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
    keyed = f" tbcm_kernels {_kernels()}"
    if not torch.compiler.config.cache_key_tag.endswith(keyed):
        torch.compiler.config.cache_key_tag += keyed
    config.recompile_limit = max(most, config.recompile_limit)
    config.accumulated_recompile_limit = max(most, config.accumulated_recompile_limit)
    options = fold_options() if fold else None
    return cast("F", torch.compile(fn, fullgraph=True, dynamic=False, options=options))


def compiled_if_possible(fn: F, *, fold: bool) -> F:
    """As `compiled`; where torch.compile cannot trace `fn` (what it does may depend on its tensors' values) it runs as
    it is, with a warning."""
    made: F | None = compiled(fn, fold=fold)

    def run(*args: Any, **kwargs: Any) -> object:
        nonlocal made
        if made is not None:
            try:
                return made(*args, **kwargs)
            except TorchDynamoException as error:
                made = None
                logger.warning("this network cannot be compiled and runs eagerly: %s", first_line(error))
        return fn(*args, **kwargs)

    return cast("F", run)


@cache
def _kernels() -> str:
    """A digest of the fused operators' code. Compiled code holds them, and is kept on the disk by keys that know what
    operator was called and not what it was."""
    digest = hashlib.sha256()
    for path in sorted(Path(tbcm_kernels.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
