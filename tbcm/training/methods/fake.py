"""DMD2's second network: it learns the distribution of the student's samples (see `tbcm.method.dmd2`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tbcm.config import Config
from tbcm.config.methods import Fake as Settings
from tbcm.method.types import Condition
from tbcm.runtime import distributed
from tbcm.runtime.optimizer import build_optimizer, clip_and_check, gated_step
from tbcm.runtime.parallel import accumulating, parallelize
from tbcm.runtime.trained import TrainedWeights
from tbcm.setup.networks import AnyNetwork, build_student
from tbcm.setup.parts import Parts
from tbcm.setup.precision import autocast, dtype_of


class Fake:
    """A network like the student, which starts equal to the conditional teacher, with an optimiser of its own. Over
    many ranks it is divided as the student is."""

    def __init__(self, config: Config, settings: Settings, device: torch.device, parts: Parts) -> None:
        self.settings, self.device = settings, device
        self.net: AnyNetwork = build_student(config, parts.teacher)
        blocks = () if config.student.lora else self.net.blocks
        self.wrapped = parallelize(self.net, blocks, config.parallel.mode, config.parallel.shard, device)
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(settings.optimizer, self.parameters, lr=settings.lr)
        self.dtype = dtype_of(config.student.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    @torch.no_grad()
    def velocity(self, u: Tensor, s: Tensor, condition: Condition, guidance: Tensor) -> Tensor:
        """F, without a graph."""
        F: Tensor = self.wrapped(u, s, condition, guidance).F
        return F

    def update(self, losses: Sequence[Callable[[], Tensor]], finite: Tensor) -> tuple[Tensor, Tensor]:
        """One step on the sum of `losses`, each computed when it is called and this rank's share of a global mean. It
        is made where `finite` says so and its gradient is. Returns whether it was, a bool scalar on the device, and
        the sum."""
        total = torch.zeros((), device=self.device)
        for i, loss in enumerate(losses):
            with accumulating(self.wrapped, last=i == len(losses) - 1), autocast(self.dtype, self.device):
                value = loss()
                self.scaler.scale(value * distributed.world_size()).backward()
            total += value.detach()
        self.scaler.unscale_(self.optimizer)
        _, own = clip_and_check(self.parameters, self.settings.clip)
        made = distributed.all_true(finite & own)
        gated_step(self.optimizer, made)
        self.scaler.update()
        self.give_up()
        return made, total

    def give_up(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        weights = TrainedWeights(self.net)
        return {"fake": weights, "fake_optimizer": self.optimizer, "fake_scale": LossScale(self.scaler)}


class LossScale:
    """The state of a gradient scaler, which is there also where it is off: a run may go on in another precision."""

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict() or torch.amp.GradScaler("cpu", enabled=True).state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state)
