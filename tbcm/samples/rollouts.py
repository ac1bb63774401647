"""Where training samples come from: the teacher's trajectories for a step's prompts, and all their random draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tbcm.config.methods import Rolled, Route
from tbcm.config.resolution import MOST_SIZES, Size
from tbcm.data.captions import batch_epochs, batch_indices, drawn
from tbcm.method.brightness import keep_mask
from tbcm.method.rollout import Velocity, embedded, rollout
from tbcm.method.route import logit_normal_route, random_route, reference_route
from tbcm.method.types import Condition, TeacherNetwork, Trajectory
from tbcm.models.text import TextEncoder, encode_null
from tbcm.runtime.distributed import local_slices
from tbcm.runtime.graphs import Graphed
from tbcm.runtime.phases import phase
from tbcm.runtime.seeding import generator, stream_bytes

GRAPHS = MOST_SIZES + 8
"""Captured rollouts that are kept: one a size, and some for rollouts of fewer prompts."""

Stream = Callable[[str], torch.Generator]
"""The generator of a step's draws of that name."""


@dataclass(frozen=True)
class Draws:
    """All randomness of P prompts in one step: standard-normal noise [P, C, H, W], route [P or 1, N] in radians,
    guidance [P] and the filter's uniforms [P]."""

    noise: Tensor
    route: Tensor
    guidance: Tensor
    uniform: Tensor

    def __getitem__(self, prompts: slice) -> Draws:
        route = self.route if self.route.shape[0] == 1 else self.route[prompts]
        return Draws(self.noise[prompts], route, self.guidance[prompts], self.uniform[prompts])


def draw_size(sizes: Sequence[Size], seed: int, step: int) -> Size:
    """The size of a step's images, each as likely. One for the whole step: a batch is of one size, and which prompts
    share a batch depends on the number of ranks."""
    if len(sizes) == 1:
        return sizes[0]
    return sizes[int.from_bytes(stream_bytes(seed, step, "size", 8), "little") % len(sizes)]


def draw(
    seed: int,
    step: int,
    prompts: int,
    shape: Sequence[int],
    guidance: Sequence[float],
    draw_times: Callable[[Stream], Tensor],
    device: torch.device,
) -> Draws:
    """The draws of the step's *global* batch: a function of (seed, step, position) and of nothing else. `shape`
    [C, h, w] is a latent's; of `guidance` one is drawn for each prompt; `draw_times` makes the routes.

    Every rank draws them all and takes its slice, so the number of ranks does not change the run and no random state
    has to be saved. (A CPU and a CUDA generator give different numbers.)
    """

    def stream(name: str) -> torch.Generator:
        return generator(device, seed, step, name)

    # Filled in, not copied: a copy from pageable memory waits for the device.
    scales = torch.stack([torch.full((), scale, device=device) for scale in guidance])
    choice = torch.randint(len(scales), (prompts,), generator=stream("guidance"), device=device)
    return Draws(
        noise=torch.randn(prompts, *shape, generator=stream("noise"), device=device),
        route=draw_times(stream),
        guidance=scales[choice],
        uniform=torch.rand(prompts, generator=stream("filter"), device=device),
    )


def draw_route(route: Route, routes: int, t_max: float, sigma_data: float, source: torch.Generator) -> Tensor:
    """`routes` routes of the configured kind, [routes, N]."""
    size = routes, route.points
    if route.kind == "logit_normal":
        normal = torch.randn(size, generator=source, device=source.device)
        return logit_normal_route(normal, t_max, sigma_data=sigma_data, mean=route.p_mean, std=route.p_std)
    uniform = torch.rand(size, generator=source, device=source.device)
    if route.kind == "random":
        return random_route(uniform, t_max)
    return reference_route(uniform, t_max, shift=route.shift, train_timesteps=route.train_timesteps)


class Text(Protocol):
    """Prompts, for images of one size -> Condition; and the unconditional branch's `null_prompt` (one prompt; None:
    there is no such branch) with the rule for its mask: "own", or "conditional", the prompt's."""

    null_mask: str

    def null_prompt(self, size: Size) -> Condition | None: ...

    @property
    def modules(self) -> list[nn.Module]:
        """Networks that encode, as far as they are in memory."""
        ...

    def __call__(self, prompts: list[str], size: Size) -> Condition: ...


class TextConditions:
    """`Text` of an encoder of states and mask, which are the same for all sizes."""

    def __init__(self, encoder: TextEncoder, null_mask: str) -> None:
        self.encoder = encoder
        self.null_mask = null_mask
        embeds, mask = encode_null(encoder)
        self._null = Condition({"embeds": embeds, "mask": mask})

    @property
    def modules(self) -> list[nn.Module]:
        model = getattr(self.encoder, "model", None)
        return [] if model is None else [model]

    def null_prompt(self, size: Size) -> Condition:
        return self._null

    def __call__(self, prompts: list[str], size: Size) -> Condition:
        embeds, mask = self.encoder.encode(prompts)
        return Condition({"embeds": embeds, "mask": mask})


class GuidedTeacher:
    """The frozen teacher's guided velocity: classifier-free guidance, or its own guidance embedding where it was
    distilled with one. Keys and values of the null prompt are projected here, once a run (and size, if they differ)."""

    def __init__(
        self,
        net: TeacherNetwork,
        text: Text,
        autocast: Callable[[], AbstractContextManager[object]],
        sizes: Sequence[Size],
    ) -> None:
        self.net, self.null_mask, self.autocast = net, text.null_mask, autocast
        nulls = {size: None if net.embeds_guidance else text.null_prompt(size) for size in sizes}
        prepared = {id(null): null if null is None else self.prepare(null) for null in nulls.values()}
        self._nulls = {size: prepared[id(null)] for size, null in nulls.items()}

    def prepare(self, condition: Condition) -> Condition:
        """Keys and values of P prompts, to be used at any number of points."""
        with self.autocast():
            return self.net.prepare(condition)

    def velocity(self, prepared: Condition, guidance: Tensor, size: Size) -> Velocity:
        """Of prepared prompts, `guidance` [P]. The null prompt has each prompt's mask or its own (`null_mask`)."""
        one = self._nulls[size]
        if one is None:
            return self._in_precision(embedded(self.net, prepared, guidance))
        null = one.expand(len(prepared))
        if self.null_mask == "conditional":
            null = Condition({**null.tensors, "mask": prepared.tensors["mask"]})
        return self._in_precision(self.net.guided(prepared, null, guidance))

    def _in_precision(self, velocity: Velocity) -> Velocity:
        def answer(u: Tensor, t: Tensor) -> Tensor:
            with self.autocast():
                return velocity(u, t)

        return answer


@dataclass(frozen=True)
class Batch:
    """Prompts that are trained on together. `keep` [P] is the brightness filter's verdict."""

    trajectory: Trajectory
    condition: Condition
    keep: Tensor

    def __getitem__(self, prompts: slice) -> Batch:
        return Batch(self.trajectory[prompts], self.condition[prompts], self.keep[prompts])

    def dealt(self, at_once: int | None) -> Iterator[Batch]:
        """In parts of at most so many prompts (None: whole)."""
        for start in range(0, len(self.keep), at_once or len(self.keep)):
            yield self[start : start + (at_once or len(self.keep))]


class SampleSource(Protocol):
    """Step number -> this rank's `batches` batches. Of each prompt's points the first `first_point` are not trained on,
    which leaves `samples_per_prompt`."""

    batches: int
    first_point: int
    samples_per_prompt: int

    def __call__(self, step: int) -> Iterator[Batch]: ...


class TeacherRollouts:
    """The teacher's trajectories, rolled out of at most `prompts_per_rollout` prompts at once and dealt out in batches
    of at most `prompts_at_once`: a teacher fills a GPU with several prompts, of which the student's graph would not fit
    into its memory. Of each trajectory the first `first_point` points are not trained on."""

    def __init__(
        self,
        teacher: GuidedTeacher,
        text: Text,
        prompts: Sequence[str],
        black: Mapping[Size, Tensor],
        *,
        method: Rolled,
        t_max: float,
        first_point: int,
        seed: int,
        prompts_per_step: int,
        prompts_per_rollout: int | None = None,
        prompts_at_once: int | None = None,
        cuda_graph: bool = False,
    ) -> None:
        self.teacher, self.text, self.prompts, self.black = teacher, text, prompts, black
        self.method, self.t_max, self.seed = method, t_max, seed
        self.prompts_per_step = prompts_per_step
        self._size_of = {tuple(one.shape): size for size, one in black.items()}
        self._graph = Graphed(self._trajectory, switch="teacher.cuda_graph=false", limit=GRAPHS) if cuda_graph else None
        self.slices, self.prompts_at_once = local_slices(prompts_per_step, prompts_per_rollout), prompts_at_once
        self.batches = len(local_slices(prompts_per_step, prompts_at_once or prompts_per_rollout))
        self.first_point, self.samples_per_prompt = first_point, method.route.points - first_point

    def __call__(self, step: int) -> Iterator[Batch]:
        size = len(self.prompts), self.prompts_per_step, step
        places = list(zip(batch_indices(*size, self.seed), batch_epochs(*size), strict=True))
        image_size = draw_size([*self.black], self.seed, step)
        black, guidance = self.black[image_size], self.method.guidance
        draws = draw(self.seed, step, self.prompts_per_step, black.shape, guidance, self._draw_routes, black.device)
        for some in self.slices:
            prompts = [drawn(self.prompts, index, epoch, self.seed) for index, epoch in places[some]]
            yield from self._batch(prompts, draws[some], image_size).dealt(self.prompts_at_once)

    def _draw_routes(self, stream: Stream) -> Tensor:
        route = self.method.route
        routes = self.prompts_per_step if route.per_prompt else 1
        return draw_route(route, routes, self.t_max, self.method.sigma_data, stream("route"))

    @torch.no_grad()
    def _batch(self, prompts: list[str], draws: Draws, size: Size) -> Batch:
        sigma_data = self.method.sigma_data
        with phase("text"):
            condition = self.text(prompts, size)
        route = draws.route.expand(len(prompts), -1)
        start = {"start": draws.noise * sigma_data, "route": route, "guidance": draws.guidance}
        with phase("teacher"):
            prepared = self.teacher.prepare(condition)
            tensors = {**start, **prepared.tensors}
            x, dxdt, x0 = self._graph(tensors) if self._graph else self._trajectory(tensors, prepared.static)
        trajectory = Trajectory(x, dxdt, route, x0, draws.guidance)
        keep = keep_mask(trajectory.x0 / sigma_data, self.black[size], draws.uniform, self.method.brightness_threshold)
        return Batch(trajectory, condition, keep)

    def _trajectory(self, tensors: Mapping[str, Tensor], static: Mapping[str, Any] | None = None) -> tuple[Tensor, ...]:
        """x, dx/dt and x_0, a function of tensors alone so that it can be captured in a CUDA graph."""
        start, route, guidance = (tensors[name] for name in ("start", "route", "guidance"))
        known = {name: tensors[name] for name in tensors if name not in ("start", "route", "guidance")}
        prepared = Condition(known, static or {})
        velocity = self.teacher.velocity(prepared, guidance, self._size_of[tuple(start.shape[1:])])
        trajectory = rollout(velocity, start, route, guidance, self.method.sigma_data)
        return trajectory.x, trajectory.dxdt, trajectory.x0
