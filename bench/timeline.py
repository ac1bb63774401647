"""Where the time of a step goes: a table of its kernels, and a trace for chrome://tracing, Perfetto or TensorBoard.

    python bench/timeline.py --arms fast                     # on a GPU
    python bench/timeline.py --device cpu --model tiny

Writes profile.txt and profile.json.gz into --out.
"""

from __future__ import annotations

import gzip
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from speed import arms, options
from speed.measure import Measured, quiet

from tbcm.errors import UserError, command
from tbcm.runtime.files import atomic_path

ROWS = 40
MOST_BYTES = 15 * 2**20
"""Of a trace that may have to be carried."""


def profile(measured: Measured, out: Path) -> str:
    """Of one step after the warm-up. Returns the table."""
    device = measured.device
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=kinds) as found:
        measured.step()
    table = found.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=ROWS)
    with atomic_path(out / "profile.txt") as part:
        part.write_text(table, encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, atomic_path(out / "profile.json.gz") as part:
        trace = Path(folder) / "trace.json"
        found.export_chrome_trace(str(trace))
        with trace.open("rb") as plain, gzip.open(part, "wb") as packed:
            shutil.copyfileobj(plain, packed)
        if (size := part.stat().st_size) > MOST_BYTES:
            print(f"the trace has {size / 2**20:.0f} MiB: too much to carry, a step of fewer points has less")
    return table


@command
def main() -> None:
    parser = options.parser("timeline.py", __doc__, ["tbcm"], "as without it")
    parser.add_argument("--points", type=int, default=16, help="of a route (the first does not train)")
    arguments = parser.parse_args()
    device, model = options.machine(arguments)
    names = arguments.arms or ["fast"]
    if len(names) > 1 or len(arguments.methods) > 1:
        raise UserError("one arm and one method: each has a trace of its own")
    quiet()
    arguments.out.mkdir(parents=True, exist_ok=True)
    config = arms.config(model, names[0], arguments.methods[0], arguments.points - 1, arguments.points, device)
    measured = Measured(names[0], config, device)
    measured.warm_up()
    print(profile(measured, arguments.out))


if __name__ == "__main__":
    sys.exit(main())
