from __future__ import annotations

import subprocess
import sys

CHILD = """
import resource, torch
from tbcm.runtime.allocator import reuse_freed_memory
if {reuse}: assert reuse_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(200): torch.empty(2**21).fill_(1.0)  # 8 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_blocks_are_not_mapped_again() -> None:
    """Page faults of 200 tensors of 8 MiB, one after another: each is mapped anew, or they are one block."""

    def faults(reuse: bool) -> int:
        child = [sys.executable, "-c", CHILD.format(reuse=reuse)]
        return int(subprocess.run(child, check=True, capture_output=True, text=True).stdout)

    assert faults(True) < 0.1 * faults(False)
