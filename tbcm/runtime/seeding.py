"""Randomness as a pure function of (seed, step, stream): nothing to save, nothing to restore, nothing tied to a rank.

Every rank draws the noise, route, guidance and filter of the *global* batch from the same generator and keeps its
`distributed.local_slice` of it. So a run does not depend on the number of ranks, and a resumed run continues as if it
had never stopped. (The same seed gives different draws on a CPU and on a GPU: their generators differ.)
"""

from __future__ import annotations

import hashlib

import torch


def stable_seed(seed: int, step: int, stream: str) -> int:
    """A 64-bit seed that is the same in every process and version (Python's `hash` of a string is not)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def generator(device: torch.device | str, seed: int, step: int, stream: str) -> torch.Generator:
    """A fresh generator on `device` for one purpose (`stream`, such as "noise" or "route") in one training step."""
    return torch.Generator(device).manual_seed(stable_seed(seed, step, stream))
