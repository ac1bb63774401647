from __future__ import annotations

import subprocess
import sys

CHILD = """
import ctypes, torch
from tbcm.runtime.allocator import reuse_freed_memory
if {reuse}: assert reuse_freed_memory()
fields = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()  # <malloc.h>
Info = type("Info", (ctypes.Structure,), {{"_fields_": [(name, ctypes.c_size_t) for name in fields]}})
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Info
for size in (12, 24): torch.empty(size * 2**18)  # MiB, freed at once
print(mallinfo2().fordblks)
"""


def test_freed_blocks_are_kept() -> None:
    """MiB the C library holds free after tensors of 12 and 24 MiB: the memory of both, or none (each was unmapped)."""

    def kept(reuse: bool) -> float:
        child = [sys.executable, "-c", CHILD.format(reuse=reuse)]
        return int(subprocess.run(child, check=True, capture_output=True, text=True).stdout) / 2**20

    assert kept(False) < 12
    assert kept(True) >= 24
