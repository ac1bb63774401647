"""The methods as the trainer uses them: where samples come from, the loss in terms, and what else a method trains.

A new method is its settings (`tbcm.config.methods`), a class here, and its row below.
"""

from __future__ import annotations

import torch

from tbcm.config import Config
from tbcm.setup.parts import Parts
from tbcm.training.methods.dmd2 import Dmd2
from tbcm.training.methods.lcm import Lcm
from tbcm.training.methods.method import Method
from tbcm.training.methods.pcm import Pcm
from tbcm.training.methods.scm import Scm
from tbcm.training.methods.sprint import Sprint
from tbcm.training.methods.tbcm import Tbcm

METHODS: dict[str, type[Method]] = {
    "tbcm": Tbcm,
    "scm": Scm,
    "sprint": Sprint,
    "lcm": Lcm,
    "pcm": Pcm,
    "dmd2": Dmd2,
}


def build_method(config: Config, device: torch.device, parts: Parts) -> Method:
    """The configured method."""
    return METHODS[config.method.name](config, device, parts)
