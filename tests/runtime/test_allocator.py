from __future__ import annotations

import subprocess
import sys

CHILD = """
import resource, torch
from tbcm.runtime.allocator import reuse_freed_memory
if {reuse}: assert reuse_freed_memory()
def step(): [torch.empty(2**21).fill_(1.0) for _ in range(6)]  # 8 MiB each, alive together, then all freed
for _ in range(5): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_blocks_are_not_mapped_again() -> None:
    """Page faults of 20 rounds of 6 tensors of 8 MiB: every round is mapped anew, or all use the first one's memory."""

    def faults(reuse: bool) -> int:
        child = [sys.executable, "-c", CHILD.format(reuse=reuse)]
        return int(subprocess.run(child, check=True, capture_output=True, text=True).stdout)

    assert faults(True) < 0.1 * faults(False)
