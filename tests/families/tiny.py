"""Whole pipelines of the real diffusers classes with tiny random networks, for tests and for a first try.

They are built in unets.py, joint.py and crossed.py, by the kind of their network, of what is in parts.py.

python tests/families/tiny.py sdxl OUT       # writes a folder as save_pretrained does
"""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from families import crossed, joint, unets  # noqa: F401 - they fill BUILDERS
from families.parts import BUILDERS, Tiny, builder, kl, t5, words

__all__ = ["BUILDERS", "Tiny", "builder", "kl", "make", "t5", "words"]


def make(name: str, dtype: torch.dtype = torch.float32) -> Tiny:
    """The tiny pipeline `name`, with a scheduler of its own and the networks of every call, no weight of which is zero
    or may be changed."""
    tiny = _made(name, dtype)
    pipe = copy.copy(tiny.pipe)
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    return replace(tiny, pipe=pipe)


@cache
def _made(name: str, dtype: torch.dtype) -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny = BUILDERS[name]()
        for part in tiny.pipe.components.values():
            if isinstance(part, nn.Module):
                for parameter in part.parameters():  # nothing may stay at a zero initialisation
                    if parameter.abs().max() == 0:
                        nn.init.normal_(parameter, std=0.05)
                part.to(dtype).eval().requires_grad_(False)
    tiny.pipe.set_progress_bar_config(disable=True)
    return tiny


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a tiny random pipeline, to try the package with.")
    parser.add_argument("family", choices=sorted(BUILDERS))
    parser.add_argument("out", help="the folder to write")
    arguments = parser.parse_args()
    make(arguments.family).pipe.save_pretrained(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
