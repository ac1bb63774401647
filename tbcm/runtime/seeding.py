"""Randomness as a pure function of (seed, step, stream): nothing to save, nothing to restore, nothing tied to a rank.

Every rank draws the noise, route, guidance and filter of the *global* batch from the same generator and keeps its
`distributed.local_slice` of it. So a run does not depend on the number of ranks, and a resumed run continues as if it
had never stopped. (The same seed gives different draws on a CPU and on a GPU: their generators differ.)

A generator gets all the state it has from a hash of the three: of a seed a CPU's takes the low 32 bits only, and of
the 10^5 streams of a run of 20,000 steps two would then be the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

_MT19937_WORDS = 624


def generator(device: torch.device | str, seed: int, step: int, stream: str) -> torch.Generator:
    """A fresh generator on `device` for one purpose (`stream`, such as "noise" or "route") in one training step.

    Two that differ in any of the three, a seed's high bits included, share numbers with a probability below 2^-100.
    """
    made = torch.Generator(device)
    _set_state(made, seed, step, stream)
    return made


@contextmanager
def seeded(device: torch.device, seed: int, stream: str) -> Iterator[None]:
    """Inside, PyTorch's default generators, of the CPU and of `device`, are those of one purpose before the first step;
    afterwards they are as they were. For layers, whose initial weights come from nowhere else."""
    on_gpu = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=on_gpu):
        for default in (torch.default_generator, *(_default_of(gpu) for gpu in on_gpu)):
            _set_state(default, seed, 0, stream)
        yield


def stream_bytes(seed: int, step: int, stream: str, count: int) -> bytes:
    """`count` bytes that are the same in every process and version (Python's `hash` of a string is not)."""
    return hashlib.shake_256(f"{seed}/{step}/{stream}".encode()).digest(count)


def _set_state(of: torch.Generator, seed: int, step: int, stream: str) -> None:
    if of.device.type == "cpu":
        words = np.frombuffer(stream_bytes(seed, step, stream, 4 * _MT19937_WORDS), "<u4")
        with _disable_current_modes():  # a step that is only traced has real generators
            state = of.manual_seed(0).get_state()
            # Before the words: the seed, how many of them are left (1: none, all are to be made anew), flags.
            state.view(torch.int64)[3 : 3 + _MT19937_WORDS] = torch.from_numpy(words.astype(np.int64))
            of.set_state(state)
        return
    key, counter = np.frombuffer(stream_bytes(seed, step, stream, 16), "<u8").tolist()
    of.manual_seed(key)
    of.set_offset(counter >> 4 << 2)  # Philox counts in fours; 2^60 of 2^62 places, far from where it would wrap


def _default_of(gpu: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[torch.cuda.current_device() if gpu.index is None else gpu.index]
