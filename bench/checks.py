"""Whether a GPU computes what it should, before anything is timed on it.

    python bench/checks.py                                   # on a GPU: everything at real shapes
    python bench/checks.py operators --device cpu            # the kernels in Triton's interpreter, at small ones

operators   every fused operator, its tangents and gradients in bf16, fp16 and fp32 against PyTorch's in fp64
graph       a rollout replayed from a CUDA graph against the same one launched kernel by kernel
overlap     rollouts on a stream of their own against the same in sequence, over steps that change the student
update      the fused optimizer steps against the plain ones, over five steps
sync        a step during which the host may not wait for the device
fp8         the error of an fp8 teacher's velocity
methods     loss and gradients of a step of every method against a CPU's, from the same draws, in fp32

Rows go to bench/results/checks.jsonl. The exit status is 1 where one does not pass.
"""

from __future__ import annotations

import argparse
import os
import sys

if __name__ == "__main__" and "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from pathlib import Path
from typing import Any

import torch
from rows import RESULTS, append, table
from speed.checks import CHECKS, Row, Setting
from speed.measure import freed, quiet
from tqdm import tqdm

from tbcm.config.paths import path_argument
from tbcm.errors import UserError, command
from tbcm.runtime.distributed import pick_device

COLUMNS = {"check": "check", "case": "case", "error": "error", "allowed": "allowed", "passed": "passed", "note": "note"}


def run(names: list[str], setting: Setting, out: Path) -> list[Row]:
    """Each row is written as it is found; a check that breaks is a row that does not pass."""
    rows: list[Row] = []

    def note(name: str, row: Row) -> None:
        rows.append(append("checks", {"check": name, **row}, out))

    for name in tqdm(names, desc=f"checks on {setting.device.type}", unit="check", disable=None):
        try:
            with freed(setting.device):
                for row in CHECKS[name](setting):
                    note(name, row)
        except UserError as error:  # what this machine cannot do
            note(name, {"case": name, "note": str(error), "passed": None})
        except Exception as error:
            note(name, {"case": name, "note": f"{type(error).__name__}: {error}", "passed": False})
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python bench/checks.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"default: all. {', '.join(CHECKS)}")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    parser.add_argument("--model", choices=["sana-600m", "sana-1600m", "tiny"], help="default: sana-600m on CUDA")
    parser.add_argument("--dtypes", nargs="+", choices=["bf16", "fp16", "fp32"], default=["bf16", "fp16", "fp32"])
    parser.add_argument("--out", type=path_argument, default=RESULTS, help="folder of the rows")
    return parser.parse_args()


@command
def main() -> int:
    arguments = parse()
    if unknown := [name for name in arguments.checks if name not in CHECKS]:
        raise UserError(f"{unknown[0]}: no such check; choose of {', '.join(CHECKS)}")
    device = pick_device(arguments.device)
    model = arguments.model or ("sana-600m" if device.type == "cuda" else "tiny")
    quiet()
    torch.backends.cudnn.allow_tf32 = False  # fp32 is compared with fp32
    rows: list[Any] = run(arguments.checks or list(CHECKS), Setting(device, model, arguments.dtypes), arguments.out)
    print(table(rows, {key: name for key, name in COLUMNS.items() if any(row.get(key) is not None for row in rows)}))
    failed = sum(row["passed"] is False for row in rows)
    print(f"{len(rows)} checks: {failed} failed, {sum(row['passed'] is None for row in rows)} could not be made here")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
