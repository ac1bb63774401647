"""The settings of each method: of where its samples come from, and of its loss. `method.name` says which they are."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag, model_validator

from tbcm.config.section import NonNegativeInt, Section


class Route(Section):
    kind: Literal["reference", "logit_normal", "random"] = "reference"
    points: Annotated[int, Field(ge=2)] = 16
    per_prompt: bool = Field(False, description="a route for each prompt instead of one a step")
    shift: PositiveFloat = 2.5
    train_timesteps: PositiveInt = 1000
    p_mean: float = 0.2
    p_std: PositiveFloat = 1.6


class R(Section):
    warmup_steps: NonNegativeInt = 4000
    final: Annotated[float, Field(gt=0, le=1)] = 0.75
    cooldown_start: NonNegativeInt | None = Field(15000, description="null: warm up straight to `final`")
    cooldown_steps: NonNegativeInt = 2000


class Judge(Section):
    """Heads on the frozen teacher's tokens, and the adversarial loss."""

    weight: PositiveFloat = Field(0.5, description="of the adversarial loss beside the method's own")
    layers: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = Field(
        None, description="the teacher's blocks, counted from 0, whose tokens are scored; default: five spread over it"
    )
    noise_mean: float = Field(-0.6, description="of the logit-normal times to which fakes and reals are noised")
    noise_std: PositiveFloat = 1.0
    optimizer: Literal["adamw", "came"] = "adamw"
    lr: PositiveFloat = 1e-4
    clip: PositiveFloat = 1.0


class Adversary(Judge):
    """Sana-Sprint's."""

    max_time: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="share of the student's images that are judged from t_max, where one-step generation starts"
    )


class PhasedAdversary(Judge):
    """PCM's."""

    weight: PositiveFloat = Field(0.1, description="of the adversarial loss beside the method's own")


class MatchingAdversary(Judge):
    """DMD2's."""

    weight: PositiveFloat = Field(0.005, description="of the adversarial loss beside the method's own")


class Fake(Section):
    """DMD2's second network, which learns the distribution of the student's samples."""

    updates: PositiveInt = Field(5, description="for each update of the student")
    optimizer: Literal["adamw", "came"] = "adamw"
    lr: PositiveFloat = 1e-5
    clip: PositiveFloat = 1.0


class Noise(Section):
    """To which times DMD2 noises the student's samples, to compare distributions there: places in [low, high] among the
    timesteps of a flow schedule, each as likely."""

    low: Annotated[float, Field(gt=0, lt=1)] = 0.02
    high: Annotated[float, Field(gt=0, le=1)] = 0.98
    shift: PositiveFloat = Field(3.0, description="of the timesteps, as in the teacher's flow schedule")

    @model_validator(mode="after")
    def _ascends(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"method.noise.low = {self.low:g}: should be below method.noise.high = {self.high:g}")
        return self


class Times(Section):
    """The baselines' times: sigma_data tan t = exp(a), a ~ N(mean, std^2)."""

    mean: float = 0.2
    std: PositiveFloat = 1.6


class Solver(Section):
    """The teacher's ODE solver, a step of which leads from a sample to where a discrete method asks its target."""

    skip: PositiveInt = Field(20, description="timesteps that a step of the solver takes at once (k of LCM's paper)")
    timesteps: PositiveInt = 1000
    shift: PositiveFloat = Field(3.0, description="of the timesteps, as in the teacher's flow schedule")

    @model_validator(mode="after")
    def _skips_some(self) -> Self:
        if self.skip > self.timesteps:
            raise ValueError(f"method.solver.skip = {self.skip}: at most method.solver.timesteps = {self.timesteps}")
        return self


class _Method(Section):
    """What all methods share."""

    with_images: ClassVar[str] = ""
    """How an error names the settings by which a method that can do without learns from images."""

    sigma_data: PositiveFloat = 0.5
    guidance: Annotated[list[float], Field(min_length=1)] = Field([4.0, 4.5, 5.0], description="drawn from per prompt")

    @property
    def from_images(self) -> bool:
        """Whether it learns from images, or else from prompts alone."""
        return False

    @property
    def continuous(self) -> bool:
        """Whether its loss asks the student for its derivative, and for the log-variance by which it is weighted."""
        return False

    @property
    def judge(self) -> Judge | None:
        """Its adversarial term, if it has one."""
        return None

    @property
    def default_steps(self) -> int:
        """In how many the student is sampled where nothing is said."""
        return self.jumps

    @property
    def jumps(self) -> int:
        """Parts of the trajectory, which the student crosses by a jump each. Of one, any jump ends at data,
        and it is sampled in any number of steps."""
        return 1

    @property
    def default_guidance(self) -> float:
        """The middle one of those trained on."""
        scales = sorted(self.guidance)
        return scales[len(scales) // 2]

    @property
    def points(self) -> int:
        """Points of a trajectory, of which one is rolled out for each prompt (TBCM) or made of each image."""
        return 1


class _Consistency(_Method):
    """What TBCM, sCM and Sana-Sprint share: the continuous-time consistency loss."""

    r: R = R()
    tangent_c: PositiveFloat = 0.1

    @property
    def continuous(self) -> bool:
        return True


class Tbcm(_Consistency):
    """Samples are points of the teacher's own trajectories."""

    name: Literal["tbcm"] = "tbcm"
    route: Route = Route()
    brightness_threshold: Annotated[float, Field(ge=0)] = Field(
        1.0, description="of the brightness filter; 0 turns it off"
    )

    @property
    def points(self) -> int:
        return self.route.points


class Scm(_Consistency):
    """Samples are images, noised to one time each."""

    name: Literal["scm"]
    times: Times = Times()

    @property
    def from_images(self) -> bool:
        return True


class Sprint(_Consistency):
    """sCM and an adversarial loss."""

    name: Literal["sprint"]
    times: Times = Times()
    adversary: Adversary = Adversary()

    @property
    def from_images(self) -> bool:
        return True

    @property
    def judge(self) -> Judge:
        return self.adversary


class Discrete(_Method):
    """Discrete consistency distillation: samples of either kind, the teacher's solver, a distance and a target."""

    with_images = " with method.samples=images"
    samples: Literal["trajectories", "images"] = Field(
        "trajectories", description="points of the teacher's own trajectories (`route`), or noised images (`times`)"
    )
    route: Route = Route()
    brightness_threshold: Annotated[float, Field(ge=0)] = Field(
        1.0, description="of the brightness filter of trajectories; 0 turns it off"
    )
    times: Times = Times()
    solver: Solver = Solver()
    distance: Literal["huber", "l2"] = "huber"
    huber_c: PositiveFloat = Field(0.001, description="where the Huber distance turns from a square to a length")
    target_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.95, description="of the target network, an average of the student's weights; 0: the student itself"
    )

    @property
    def from_images(self) -> bool:
        return self.samples == "images"

    @property
    def points(self) -> int:
        return 1 if self.from_images else self.route.points


class Lcm(Discrete):
    """Latent consistency distillation."""

    name: Literal["lcm"]


class Pcm(Discrete):
    """Phased consistency: LCM in parts of the trajectory."""

    name: Literal["pcm"]
    phases: PositiveInt = Field(4, description="parts of the trajectory, and steps in which the student is sampled")
    target_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="of the target network, an average of the student's weights; 0: the student itself"
    )
    adversary: PhasedAdversary | None = Field(None, description="its adversarial term; null: without")

    @model_validator(mode="after")
    def _phases_have_steps(self) -> Self:
        if self.phases * self.solver.skip > self.solver.timesteps:
            raise ValueError(
                f"method.phases = {self.phases}: a phase is shorter than a step of the solver, {self.solver.skip} of"
                f" {self.solver.timesteps} timesteps"
            )
        return self

    @property
    def judge(self) -> Judge | None:
        return self.adversary

    @property
    def jumps(self) -> int:
        return self.phases


class Dmd2(_Method):
    """Distribution matching, on samples of the student's own."""

    with_images = " with method.adversary"
    name: Literal["dmd2"]
    steps: PositiveInt = Field(1, description="of sampling, for which the student is trained")
    noise: Noise = Noise()
    fake: Fake = Fake()
    adversary: MatchingAdversary | None = Field(
        None, description="its adversarial term, whose real samples are images; null: without, and without images"
    )

    @property
    def from_images(self) -> bool:
        return self.adversary is not None

    @property
    def judge(self) -> Judge | None:
        return self.adversary

    @property
    def default_steps(self) -> int:
        return self.steps


def _name(method: Any) -> Any:
    """Which of them a section is for: TBCM where it does not say."""
    return method.get("name", "tbcm") if isinstance(method, dict) else getattr(method, "name", None)


Method = Annotated[
    Annotated[Tbcm, Tag("tbcm")]
    | Annotated[Scm, Tag("scm")]
    | Annotated[Sprint, Tag("sprint")]
    | Annotated[Lcm, Tag("lcm")]
    | Annotated[Pcm, Tag("pcm")]
    | Annotated[Dmd2, Tag("dmd2")],
    Discriminator(_name),
]
Rolled = Tbcm | Lcm | Pcm
"""Of which trajectories are rolled out."""
Noised = Scm | Sprint | Lcm | Pcm
"""Of which images are noised."""


def trajectories_of(method: Tbcm | Scm | Sprint | Lcm | Pcm | Dmd2) -> Rolled:
    """How trajectories are rolled out for a run of this method: as TBCM does it by default, if its own makes none."""
    if isinstance(method, Rolled):
        return method
    return Tbcm(sigma_data=method.sigma_data, guidance=method.guidance)
