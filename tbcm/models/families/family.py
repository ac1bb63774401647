"""A family: the facts of one diffusers pipeline class, all that the rest of the package does not take for granted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tbcm.config.resolution import Size
from tbcm.method.formulation import Diffusion, Edm, Flow, Formulation
from tbcm.method.types import Condition
from tbcm.models.families.layout import Image, Layout
from tbcm.models.families.recording import Call, flattened, nested, padded, record_calls

LENGTH = "#length"
"""Ends the name of a tensor [P] with the lengths of ragged text, beside the padded text itself."""


@dataclass(frozen=True)
class Facts:
    """What a pipeline's files say, without its weights: the network's configuration and the scheduler (an object)."""

    network: Mapping[str, Any]
    scheduler: Any


Combine = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(unconditional, conditional, w broadcastable) -> guided; all in the network's own layout."""


def plain(null: Tensor, given: Tensor, w: Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022)."""
    return null + w * (given - null)


def from_given(null: Tensor, given: Tensor, w: Tensor) -> Tensor:
    """Z-Image counts its scale from the conditional branch: its w is `plain`'s less 1."""
    return given + w * (given - null)


def renormed(null: Tensor, given: Tensor, w: Tensor) -> Tensor:
    """`plain`, with the conditional branch's norm over the last axis (Qwen-Image: of each token; Lumina2)."""
    out = plain(null, given, w)
    return out * (given.norm(dim=-1, keepdim=True) / out.norm(dim=-1, keepdim=True))


def flow(facts: Facts, **options: Any) -> Flow:
    shift = facts.scheduler.config.get("shift") or facts.scheduler.config.get("flow_shift") or 1.0
    return Flow(**{"sampling_shift": float(shift)} | options)


def unit_flow(facts: Facts) -> Flow:
    """The network is given s in [0, 1]."""
    return flow(facts, scale=1.0)


def diffusion(facts: Facts) -> Formulation:
    """Of any scheduler with a table of alphas; EDM where its scheduler is one of EDM's."""
    config = facts.scheduler.config
    if "EDM" in type(facts.scheduler).__name__:
        return Edm(config.sigma_min, config.sigma_max, config.sigma_data, config.prediction_type)
    return Diffusion(facts.scheduler.alphas_cumprod, config.get("prediction_type", "epsilon"))


@dataclass(frozen=True)
class Family:
    """One row.

    Args:
        pipeline: the class's name in diffusers; the key of the row.
        formulation: what the network was trained as.
        network: the component that is distilled.
        sample, time, guidance: names of its arguments (guidance: only where it embeds the scale).
        layout: how it wants its latents.
        static: arguments that are the same for all prompts.
        ragged: text that comes in its own length for each prompt; `by_list`: as a list (else prompts of one length at a
            time, where padding is not masked).
        masks: text -> its mask, where the pipeline leaves a mask of ones out.
        combine: how the pipeline combines the branches of classifier-free guidance.
        null_first: whether the unconditional branch comes first in a batch of both.
        prompts: a list of prompts as arguments of the pipeline.
        guided: what else makes it run both branches; `unguided`: what makes it run one.
        sized: whether its call takes a height and a width; `always`: what else it is to be told.
        output: where its call's answer has the images, or videos.
        most_tokens: of its network's configuration, for how many tokens along a side there are positions (None: any).
        example: a prompt that any of its pipelines takes.
        times: how its call is told the times: "sigmas" or "timesteps" are arguments, "grid" is its scheduler's own for
            the number of steps, "terminal" the same from noise to where its scheduler is told to end.
    """

    pipeline: str
    formulation: Callable[[Facts], Formulation] = flow
    network: str = "transformer"
    sample: str = "hidden_states"
    time: str = "timestep"
    guidance: str | None = None
    layout: Layout = field(default_factory=Image)
    static: tuple[str, ...] = ()
    ragged: tuple[str, ...] = ()
    by_list: bool = False
    masks: Mapping[str, str] = field(default_factory=dict)
    combine: Combine = plain
    null_first: bool = True
    prompts: Callable[[Sequence[str]], dict[str, Any]] = lambda prompts: {"prompt": list(prompts)}
    guided: Callable[[int], dict[str, Any]] = lambda count: {"guidance_scale": 4.0}
    unguided: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    times: Literal["sigmas", "timesteps", "grid", "terminal"] = "sigmas"
    sized: bool = True
    always: Mapping[str, Any] = field(default_factory=dict)
    output: Literal["images", "frames"] = "images"
    most_tokens: Callable[[Mapping[str, Any]], int | None] = lambda config: None
    example: str = "a red panda"

    def patch(self, config: Mapping[str, Any]) -> int:
        """Latents that make a token, along one side, of a network with this configuration."""
        patch = config.get("patch_size") or config.get("all_patch_size") or 1
        return max(patch if isinstance(patch, int) else patch[-1], self.layout.patch)

    @property
    def makes_videos(self) -> bool:
        return "num_frames" in self.always

    def of_frames(self, frames: int) -> Family:
        """The same, called for videos of so many frames, where it makes videos."""
        return replace(self, always={**self.always, "num_frames": frames}) if self.makes_videos else self

    def sized_call(self, size: Size) -> dict[str, Any]:
        """Arguments of the pipeline's call for images of this size."""
        sides = {"height": size[0], "width": size[1]} if self.sized else {}
        return {**sides, **self.always}

    def encode(self, pipe: Any, prompts: Sequence[str], **size: Any) -> tuple[Condition, Condition | None]:
        """The condition of P prompts, and that of the unconditional branch (P too; None where there is none), as the
        pipeline gives them to its network. `size`: arguments of the pipeline such as height and width."""
        if self.ragged and len(prompts) > 1:  # padding would depend on the other prompts
            pairs = [self.encode(pipe, [prompt], **size) for prompt in prompts]
            nulls = [null for _, null in pairs if null is not None]
            return Condition.cat(*(given for given, _ in pairs)), Condition.cat(*nulls) if nulls else None
        arguments = {**self.prompts(prompts), **self.guided(len(prompts)), **size}
        calls = record_calls(pipe, self.network, self.sample, arguments)
        parts = [self._condition(call, len(prompts)) for call in calls]
        if len(parts) == 2:
            return parts[0], parts[1]
        (both,) = parts
        count = len(next(iter(both.tensors.values())))
        if count == 2 * len(prompts):
            first, second = both[: len(prompts)], both[len(prompts) :]
            return (second, first) if self.null_first else (first, second)
        return both, None

    def _condition(self, call: Call, count: int) -> Condition:
        leave_out = tuple(name for name in (self.sample, self.time, self.guidance) if name)
        tensors: dict[str, Tensor] = {}
        static: dict[str, Any] = {}
        for name, value in flattened(call, leave_out).items():
            if name in self.ragged:
                tensors[name], tensors[name + LENGTH] = padded(list(value))
            elif isinstance(value, Tensor) and name not in self.static:
                tensors[name] = value
            else:
                static[name] = value
        for text, mask in self.masks.items():
            if mask not in tensors:
                tensors[mask] = torch.ones(tensors[text].shape[:2], dtype=torch.int64, device=tensors[text].device)
        if not tensors:  # an unconditional network: what says how many samples there are
            tensors["#count"] = torch.zeros(count)
        return Condition(tensors, static)

    def call(self, net: nn.Module, sample: Any, time: Tensor, condition: Condition, guidance: Tensor | None) -> Any:
        """The network's own answer, in its own layout. All of `sample`, `time` and `condition` lead with B."""
        lengths = {name: condition.tensors[name + LENGTH].tolist() for name in self.ragged}
        if self.by_list or all(len(set(counts)) < 2 for counts in lengths.values()):
            return self._call(net, sample, time, condition, guidance, lengths)
        # Prompts of one length at a time: this network attends to padding.
        (counts,) = lengths.values()
        groups = [[i for i, count in enumerate(counts) if count == length] for length in sorted(set(counts))]
        answers = []
        for group in groups:
            index = torch.tensor(group, device=time.device)
            part = Condition({k: v[index.to(v.device)] for k, v in condition.tensors.items()}, condition.static)
            scale = None if guidance is None else guidance[index]
            same = {name: [counts[group[0]]] * len(group) for name in self.ragged}
            answers.append(self._call(net, sample[index], time[index], part, scale, same))
        order = torch.tensor([i for group in groups for i in group], device=time.device)
        return torch.cat(answers)[order.argsort()]

    def _call(
        self,
        net: nn.Module,
        sample: Any,
        time: Tensor,
        condition: Condition,
        guidance: Tensor | None,
        lengths: Mapping[str, list[int]],
    ) -> Any:
        arguments = {**condition.static}
        for name, value in condition.tensors.items():
            if name in lengths:
                rows = lengths[name]
                arguments[name] = (
                    [row[:n] for row, n in zip(value, rows, strict=True)] if self.by_list else value[:, : rows[0]]
                )
            elif "#" not in name:
                arguments[name] = value
        arguments |= {self.sample: sample, self.time: time}
        if self.guidance is not None and guidance is not None:
            arguments[self.guidance] = guidance
        return net(**nested(arguments), return_dict=False)[0]
