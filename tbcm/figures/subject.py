"""What figures are drawn of: a teacher, prompts, and the trajectories and end points that it makes of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from tbcm.config import Config, load_config
from tbcm.config.methods import Route, trajectories_of
from tbcm.config.sections import Data
from tbcm.errors import UserError
from tbcm.inference.generation import NoiseSource, Sampler
from tbcm.inference.student import NO_PROMPTS, PIPELINE_CONFIG, open_origin
from tbcm.method.rollout import rollout
from tbcm.method.types import Trajectory
from tbcm.models.pipeline import Pipeline
from tbcm.runtime.distributed import pick_device
from tbcm.runtime.seeding import generator
from tbcm.samples.rollouts import draw_route
from tbcm.setup.images import build_black_latents
from tbcm.setup.networks import build_teacher, pipeline_of
from tbcm.setup.text import build_prompts, build_text


@dataclass(frozen=True)
class Request:
    """What the command line asks for. None and () mean the figure's own default."""

    sources: tuple[str, ...] = ()
    prompts: int | None = None
    prompt_file: str | None = None
    steps: tuple[int, ...] = ()
    guidance: float | None = None
    seed: int = 0
    device: str | None = None

    @property
    def source(self) -> str:
        if len(self.sources) > 1:
            raise UserError(f"{' '.join(self.sources)}: this figure is drawn of one run or teacher")
        return self.sources[0] if self.sources else "icons"

    def one_steps(self, default: int) -> int:
        if len(self.steps) > 1:
            raise UserError(f"--steps {' '.join(map(str, self.steps))}: this figure takes one number")
        return self.steps[0] if self.steps else default


def teacher_config(path: str) -> Config:
    """Of a run's teacher, of the teacher that an exported pipeline was distilled from, or of a pipeline that is one."""
    if (Path(path) / PIPELINE_CONFIG).is_file():
        return load_config(Path(path) / PIPELINE_CONFIG)
    origin = open_origin(path)
    if not origin.is_run and is_student(path):
        raise UserError(f"{path}: a few-step student; this figure needs its teacher, or a run of tbcm")
    return origin.config


def is_student(path: str) -> bool:
    """Whether the pipeline at `path` is a few-step one."""
    return bool(Pipeline(path).index.get("_class_name") == "SanaSprintPipeline")


def open_teacher(config: Config, device: str | None) -> Sampler:
    place = pick_device(device)
    text = build_text(config, place)
    return Sampler(build_teacher(config, place), text, config, pipeline_of(config), teacher=True)


def choose_prompts(config: Config, file: str | None, count: int) -> list[str]:
    """`count` prompts, spread evenly over the file (default: the run's own, or the icons teacher's)."""
    data = config.data if file is None else Data(prompts=file, column=config.data.column)
    if data.prompts == NO_PROMPTS:
        raise UserError(f"{config.teacher.path}: no prompts are known for it; give --prompt-file FILE")
    with tempfile.TemporaryDirectory() as folder:  # not the run's: it may be read-only, or somebody else's
        prompts = build_prompts(config.model_copy(update={"data": data, "out": folder}))
        return [prompts[i * len(prompts) // count] for i in range(count)]


class Subject:
    """A teacher and P prompts. Prompt i starts from the noise that `Sampler` gives it for the same seed."""

    def __init__(self, request: Request, prompts: int) -> None:
        self.name, self.seed = request.source, request.seed
        self.config = teacher_config(request.source)
        self.prompts = choose_prompts(self.config, request.prompt_file, request.prompts or prompts)
        self.sampler = open_teacher(self.config, request.device)
        self.guidance = self.config.method.default_guidance if request.guidance is None else request.guidance
        self.sigma_data, self.t_max = self.config.method.sigma_data, self.sampler.pipeline.t_max

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def facts(self) -> dict[str, object]:
        """What every figure's numbers begin with."""
        return {"source": self.name, "prompts": len(self), "seed": self.seed, "guidance": self.guidance}

    @cached_property
    def noise(self) -> Tensor:
        """The initial noise [P, C, h, w] ~ N(0, sigma_d^2), on the CPU."""
        return self.fresh_noise(self.seed)

    def fresh_noise(self, seed: int) -> Tensor:
        return self.sigma_data * NoiseSource(seed, range(len(self)), self.sampler.shape, torch.device("cpu"))()

    def schedule(self, steps: int) -> Tensor:
        """The teacher's own flow-Euler times [1, steps], from t_max."""
        return self.sampler.pipeline.teacher_times(steps, self.sampler.size)[None]

    def routes(self, kind: str, points: int) -> Tensor:
        """One random route for each prompt, [P, points]."""
        route, source = route_of(self.config, kind, points), generator("cpu", self.seed, points, kind)
        return draw_route(route, len(self), self.t_max, self.sigma_data, source)

    def trajectories(self, t: Tensor) -> Iterator[tuple[slice, Trajectory]]:
        """The prompts' trajectories along t [P or 1, N], on the CPU, a few prompts at a time: of Sana at 1,024 pixels
        those of all would be gigabytes. With each the prompts that it is of."""
        for start in range(0, len(self), self.sampler.batch):
            part = self._follow(t, start)
            some = slice(start, start + len(part.x0))
            yield some, Trajectory(part.x.cpu(), part.dxdt.cpu(), part.t.cpu(), part.x0.cpu(), part.guidance.cpu())

    def end_points(self, t: Tensor) -> Tensor:
        """Where they end: scaled latents xbar_0 [P, C, h, w], on the CPU."""
        parts = [self._follow(t, start).x0.cpu() for start in range(0, len(self), self.sampler.batch)]
        return torch.cat(parts) / self.sigma_data

    def images(self, xbar0: Tensor) -> Tensor:
        """Scaled latents -> images [K, 3, H, W] uint8."""
        return self.sampler.decode(xbar0.float().to(self._device))

    def black(self) -> Tensor:
        """The scaled latent of a black image [C, h, w], on the CPU."""
        with tempfile.TemporaryDirectory() as folder:  # the teacher's own where its folder has it
            config = self.config.model_copy(update={"out": folder})
            return build_black_latents(config, self._device)[self.sampler.size].cpu()

    @property
    def _device(self) -> torch.device:
        return next(self.sampler.net.parameters()).device

    @torch.no_grad()
    def _follow(self, t: Tensor, start: int) -> Trajectory:
        some = slice(start, start + self.sampler.batch)
        teacher, device = self.sampler.teacher, self._device
        assert teacher is not None
        noise = self.noise[some].to(device)
        w = torch.full((len(noise),), self.guidance, device=device)
        velocity = teacher.velocity(
            teacher.prepare(self.sampler.text(self.prompts[some], self.sampler.size)), w, self.sampler.size
        )
        return rollout(velocity, noise, (t if len(t) == 1 else t[some]).to(device), w, self.sigma_data)


def route_of(config: Config, kind: str, points: int) -> Route:
    """The configured route, but of another kind or length."""
    if points < 2:
        raise UserError(f"--steps {points}: a route has at least 2 points")
    return Route.model_validate(trajectories_of(config.method).route.model_dump() | {"kind": kind, "points": points})


def spread_over(values: Sequence[float], count: int) -> list[int]:
    """Indices of `count` of the descending `values`, about evenly spaced in value, the first and last among them."""
    targets = torch.linspace(values[0], values[-1], count)
    return sorted({int((torch.tensor(values) - target).abs().argmin()) for target in targets})
