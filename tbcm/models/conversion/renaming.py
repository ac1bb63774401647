"""Tensors under published names to tensors under diffusers' names, by tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

Tensors = dict[str, Tensor]
Rules = Sequence[tuple[str, str | tuple[str, ...]]]
"""(pattern of a whole name without its .weight or .bias, the new name), or new names: of equal parts along the first
axis, in their order."""
Ignored = Sequence[tuple[str, str]]
"""(pattern of a whole name, why it is left out)."""


@dataclass(frozen=True)
class Converted:
    """`tensors` by diffusers' names; `left_out`, why by published name; `unknown` published names."""

    tensors: Tensors
    left_out: Mapping[str, str] = field(default_factory=dict)
    unknown: Sequence[str] = ()


def without(state: Tensors, ignored: Ignored) -> tuple[Tensors, dict[str, str]]:
    """The rest, and why the others are left out."""
    reasons = {name: next((why for pattern, why in ignored if re.fullmatch(pattern, name)), None) for name in state}
    return {name: state[name] for name, why in reasons.items() if not why}, {
        k: why for k, why in reasons.items() if why
    }


def renamed(state: Tensors, rules: Rules, ignored: Ignored = ()) -> Converted:
    """By the first rule that a name matches. Parts are views."""
    rest, left_out = without(state, ignored)
    tensors: Tensors = {}
    unknown = []
    for name, tensor in rest.items():
        names = _new_names(name, rules)
        if not names:
            unknown.append(name)
        parts = tensor.tensor_split(len(names)) if len(names) > 1 and tensor.dim() else [tensor] * len(names)
        tensors |= zip(names, parts, strict=True)
    return Converted(tensors, left_out, unknown)


def _new_names(name: str, rules: Rules) -> list[str]:
    whole = re.fullmatch(r"(.*?)(\.weight|\.bias)?", name, re.DOTALL)
    assert whole is not None
    stem, suffix = whole[1], whole[2] or ""
    for pattern, new in rules:
        if match := re.fullmatch(pattern, stem):
            return [match.expand(each) + suffix for each in ((new,) if isinstance(new, str) else new)]
    return []
