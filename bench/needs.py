"""What a step of a configuration needs, accounted on tensors without data.

    python bench/needs.py [--write] [CONFIG ...]

The figures are those of `tbcm.train CONFIG --dry-run` on one GPU. --write puts the table into docs/backbones.md, and
each configuration's own line into its head comment.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NamedTuple

from tbcm.config import Config, load_config
from tbcm.config.resolution import largest, shown_size
from tbcm.errors import UserError, command
from tbcm.runtime.distributed import local_slices
from tbcm.runtime.files import atomic_path
from tbcm.training.dryrun import as_on_a_gpu, counted, eager
from tbcm.training.holdings import holdings

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "backbones.md"
BEGIN, END = "<!-- made by bench/needs.py -->", "<!-- end of needs -->"
CONFIGS = ["sdxl_lora", "flux_lora", "sd35", "pixart", "sana_1600m", "sana_1gpu", "sana_12gb", "sana_v100"]
LINE = "# Needs"
NOT_MEASURED = "(accounted by bench/needs.py, not measured)"
HEADER = [
    "| configuration | size | trained, M | frozen networks | trained, with its state | peak | a step |",
    "|---|---|---|---|---|---|---|",
]
FROZEN = "teacher", "text encoder", "VAE"


class Needs(NamedTuple):
    """Of a step on one GPU: size of its images, weights that are trained, bytes, FLOPs and samples."""

    size: str
    trained: int
    frozen: int
    kept: int
    peak: int
    flops: int
    samples: int

    @property
    def row(self) -> str:
        gib = [f"{part / 2**30:.1f} GiB" for part in (self.frozen, self.kept, self.peak)]
        cells = self.size, f"{self.trained / 1e6:,.0f}", *gib, f"{self.flops / 1e15:.3g} PFLOP, {self.samples} samples"
        return " | ".join(cells)

    @property
    def line(self) -> str:
        peak, step = f"{self.peak / 2**30:.1f} GiB", f"{self.flops / 1e15:.3g} PFLOP a step of {self.samples} samples"
        return f"{LINE} {peak} at the peak and {step} on one GPU {NOT_MEASURED}."


def needs_of(config: Config) -> Needs:
    """Of several sizes the largest."""
    size = largest(config.resolution)
    slices = local_slices(config.train.prompts_per_step, config.train.prompts_per_rollout)
    train = config.train.model_copy(update={"prompts_per_step": slices[0].stop})
    one = as_on_a_gpu(eager(config.model_copy(update={"resolution": (size,), "train": train})))
    trainer, flops, peak = counted(one, len(slices))
    held = holdings(trainer)
    frozen = sum(held[name] for name in FROZEN)
    samples = config.train.prompts_per_step * trainer.source.samples_per_prompt
    weights = sum(p.numel() for p in trainer.parameters)
    return Needs(shown_size(size), weights, frozen, sum(held.values()) - frozen, peak, flops * len(slices), samples)


def write_table(found: dict[str, Needs]) -> None:
    """Rows of configurations that were not asked for stay."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    old, after = rest.split(END)
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", old, re.MULTILINE)) | {k: v.row for k, v in found.items()}
    lines = [*HEADER, *(f"| `{name}` | {rows[name]} |" for name in CONFIGS if name in rows)]
    _replace(DOCUMENT, "\n".join([f"{before}{BEGIN}", *lines, f"{END}{after}"]))


def write_line(name: str, needs: Needs) -> None:
    """In the place of the line that there is, or else at the end of the head comment."""
    file = ROOT / "configs" / f"{name}.yaml"
    lines = [line for line in file.read_text(encoding="utf-8").split("\n") if not line.startswith(LINE)]
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    _replace(file, "\n".join([*lines[:end], needs.line, *lines[end:]]))


def _replace(file: Path, text: str) -> None:
    with atomic_path(file) as part:
        part.write_text(text, encoding="utf-8")


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=CONFIGS, metavar="CONFIG", help="names in configs/")
    parser.add_argument("--write", action="store_true", help="into docs/backbones.md and the configurations")
    arguments = parser.parse_args()
    if unknown := sorted({*arguments.configs} - {*CONFIGS}):
        raise UserError(f"{unknown[0]}: should be one of {', '.join(CONFIGS)}")
    for name in arguments.configs:
        needs = needs_of(load_config(ROOT / "configs" / f"{name}.yaml"))
        print(f"{name:>10}: {needs.line.removeprefix('# ')}", flush=True)
        if arguments.write:
            write_line(name, needs)
            write_table({name: needs})


if __name__ == "__main__":
    main()
