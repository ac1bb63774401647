"""FLOPs of a step, counted on a CPU: of large models beforehand, into flops.json, since counting takes a minute an arm.

python bench/step.py --count-flops --model sana-600m       # on any machine; then commit bench/flops.json
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from tbcm.config import Config
from tbcm.runtime.files import write_json
from tbcm.training.accounting import CostCounter, SizesAlone
from tbcm.training.dryrun import as_on_a_gpu, eager
from tbcm.training.random_parts import random_parts
from tbcm.training.trainer import Trainer

FILE = Path(__file__).parents[1] / "flops.json"
_NO_WORK = "out", "data", "log", "checkpoint", "profile"
"""Sections that change no product."""


def count(config: Config) -> int:
    """Of one step, counted on its eager twin and on tensors without data: a compiled graph and a kernel do the same
    products and hide them."""
    twin, device = _twin(config), torch.device("cpu")
    with SizesAlone():
        trainer = Trainer(twin, device, random_parts(twin, device))
        trainer.train_step()  # what is made once a run
        with CostCounter() as counter:
            trainer.train_step()
    return counter.flops


def known(config: Config, file: Path = FILE) -> int | None:
    """What was counted of this configuration, if it was."""
    return _read(file).get(_key(config))


def count_into(config: Config, file: Path = FILE) -> int:
    """Counts unless that is known, and writes it down."""
    found = known(config, file)
    if found is None:
        found = count(config)
        write_json(file, _read(file) | {_key(config): found})
    return found


def _twin(config: Config) -> Config:
    """In a GPU's precision, so that both kinds of machine count the same."""
    return as_on_a_gpu(eager(config))


def _key(config: Config) -> str:
    """A name for people, and a digest of all that the twin's work depends on, which no path is, nor how products are
    divided. What is as by default is left out, so that a new setting changes no digest."""
    twin = _twin(config).model_dump(mode="json", exclude_defaults=True)
    twin = {name: section for name, section in twin.items() if name not in _NO_WORK}
    for section, name in (("teacher", "path"), ("teacher", "flash"), ("train", "prompts_per_micro_batch")):
        twin.get(section, {}).pop(name, None)
    twin["text"]["cache"] = twin["text"].get("cache") is not None
    digest = hashlib.sha256(json.dumps(twin, sort_keys=True).encode()).hexdigest()[:12]
    return f"{config.teacher.architecture} {config.method.name} {config.train.prompts_per_step} prompts {digest}"


def _read(file: Path) -> dict[str, int]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
