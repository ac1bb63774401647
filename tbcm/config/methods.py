"""The settings of each method: of where its samples come from, and of its loss. `method.name` says which they are."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag

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


class Adversary(Section):
    """Sana-Sprint's discriminator (method.name=sprint)."""

    weight: PositiveFloat = Field(0.5, description="of the adversarial loss beside sCM's")
    max_time: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="share of the student's images that are judged from t_max, where one-step generation starts"
    )
    layers: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = Field(
        None, description="the teacher's blocks, counted from 0, whose tokens are scored; default: five spread over it"
    )
    noise_mean: float = Field(-0.6, description="of the logit-normal times to which fakes and reals are noised")
    noise_std: PositiveFloat = 1.0
    optimizer: Literal["adamw", "came"] = "adamw"
    lr: PositiveFloat = 1e-4
    clip: PositiveFloat = 1.0


class Times(Section):
    """The baselines' times: sigma_data tan t = exp(a), a ~ N(mean, std^2)."""

    mean: float = 0.2
    std: PositiveFloat = 1.6


class _Consistency(Section):
    """What all methods share: the continuous-time consistency loss."""

    from_images: ClassVar[bool] = False
    """Whether it learns from images, or else from prompts alone."""

    sigma_data: PositiveFloat = 0.5
    guidance: Annotated[list[float], Field(min_length=1)] = Field([4.0, 4.5, 5.0], description="drawn from per prompt")
    r: R = R()
    tangent_c: PositiveFloat = 0.1

    @property
    def default_guidance(self) -> float:
        """The middle one of those trained on."""
        scales = sorted(self.guidance)
        return scales[len(scales) // 2]

    @property
    def points(self) -> int:
        """Points of a trajectory, of which one is rolled out for each prompt (TBCM) or made of each image."""
        return 1


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

    from_images: ClassVar[bool] = True

    name: Literal["scm"]
    times: Times = Times()


class Sprint(_Consistency):
    """sCM and an adversarial loss."""

    from_images: ClassVar[bool] = True

    name: Literal["sprint"]
    times: Times = Times()
    adversary: Adversary = Adversary()


def _name(method: Any) -> Any:
    """Which of them a section is for: TBCM where it does not say."""
    return method.get("name", "tbcm") if isinstance(method, dict) else getattr(method, "name", None)


Method = Annotated[
    Annotated[Tbcm, Tag("tbcm")] | Annotated[Scm, Tag("scm")] | Annotated[Sprint, Tag("sprint")], Discriminator(_name)
]


def trajectories_of(method: Tbcm | Scm | Sprint) -> Tbcm:
    """How trajectories are rolled out for a run of this method: as TBCM does it by default, if its own makes none."""
    return method if isinstance(method, Tbcm) else Tbcm(sigma_data=method.sigma_data, guidance=method.guidance)
