"""What a diffusers pipeline tells its network about a prompt, found by letting the pipeline itself say it.

Every pipeline class has its own `encode_prompt`, with its own arguments, outputs, masks, micro-conditions and ids. None
of that has to be learned: the pipeline's `__call__` is run, and stopped when its network has been called.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Call = dict[str, Any]
"""Arguments of one call of a network, by name; those that are None left out."""


class _EnoughError(Exception):
    pass


@torch.no_grad()
def record_calls(pipe: Any, network: str, sample: str, arguments: Mapping[str, Any]) -> list[Call]:
    """The calls of `pipe`'s network within one sampling step of `pipe(**arguments)`: one, or one a guidance branch.

    Args:
        network: the component, "transformer" or "unet". It is not run, so it may be on the meta device.
        sample: the name of its argument that takes the noisy sample.
    """
    net: nn.Module = getattr(pipe, network)
    signature, forward, step = inspect.signature(type(net).forward), net.forward, pipe.scheduler.step
    calls: list[Call] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(net, *args, **kwargs).arguments
        calls.append({name: v for name, v in given.items() if name not in ("self", "return_dict") and v is not None})
        if kwargs.get("return_dict", True):
            raise _EnoughError  # those that ask for an object make one call
        x = given[sample]
        return ([torch.zeros_like(row) for row in x] if isinstance(x, list) else torch.zeros_like(x),)

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise _EnoughError

    net.forward, pipe.scheduler.step = spy, stop
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe(**arguments, num_inference_steps=2)
    except _EnoughError:
        pass
    finally:
        net.forward, pipe.scheduler.step = forward, step
    return calls


def flattened(call: Call, leave_out: tuple[str, ...]) -> Call:
    """Without the names `leave_out`, and with what dictionaries hold as "argument.key"."""
    flat: Call = {}
    for name, value in call.items():
        if name in leave_out:
            continue
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": v for key, v in value.items() if v is not None}
        else:
            flat[name] = value
    return flat


def nested(flat: Mapping[str, Any]) -> Call:
    """The inverse of `flattened`."""
    call: Call = {}
    for name, value in flat.items():
        argument, _, key = name.partition(".")
        if key:
            call.setdefault(argument, {})[key] = value
        else:
            call[name] = value
    return call


def execution_on(pipe: Any, device: torch.device) -> Any:
    """The same pipeline, told that it runs on `device`: of its modules only the text encoders are really there."""
    there = property(lambda self: device)
    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {"_execution_device": there, "device": there})
    return pipe


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[L_i, ...] -> [P, max L, ...] with zeros behind, and the lengths [P] int64 (on the CPU: a host needs them)."""
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])
