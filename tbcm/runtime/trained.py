"""What of a network a checkpoint holds: all of it, or what is trained where the rest is frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


class TrainedWeights:
    """A module's state without what is frozen, which its teacher's files hold: buffers too, where there is any such."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.module.state_dict()
        parameters = dict(self.module.named_parameters())
        if all(parameter.requires_grad for parameter in parameters.values()):
            return state
        return {name: value for name, value in state.items() if name in parameters and parameters[name].requires_grad}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where it is another module's."""
        wanted = self.state_dict().keys()
        if different := sorted(wanted ^ state.keys()):
            raise ValueError(f"{len(different)} weights differ, the first is {different[0]}")
        self.module.load_state_dict(state, strict=False)
