"""What tables of quality compare: trainings ("arms"), each a configuration, at an equal number of optimised samples."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tbcm.config import Config, load_config
from tbcm.config.methods import Tbcm

CONFIGS = Path(__file__).parents[2] / "configs"
_IN_STEPS = (
    "optimizer.warmup_steps",
    "optimizer.cooldown_steps",
    "method.r.warmup_steps",
    "method.r.cooldown_start",
    "method.r.cooldown_steps",
    "ema.halflife_steps",
)
"""Settings that a shorter or longer run takes in proportion."""
_WARM_UPS = {"icons.yaml": (("method.r.warmup_steps", 0.5), ("optimizer.warmup_steps", 0.2))}
"""By recipe, shares of a run in the place of its own tenth and fiftieth, with which TBCM is ruined in a run as short as
these (KID to the teacher 250 instead of 9, after 4,800 samples). The baselines are not, and do best with theirs."""
_SANA = ("student.guidance_embeds_scale=null", "method.r.final=1.0")
_DISCRETE = (
    "student.guidance_embeds_scale=null",
    "method.route.shift=2.5",
    "method.route.points=15",  # all of which train
    "train.prompts_per_step=8",
    "optimizer.cooldown_steps=0",
)
_PUBLISHED = {
    "icons.yaml": (
        *_SANA,
        "method.route.shift=2.5",
        "method.route.points=16",
        "train.prompts_per_step=8",
        "optimizer.cooldown_steps=0",
    ),
    "icons_scm.yaml": (*_SANA, "method.times.mean=0.2"),
    "icons_sprint.yaml": (*_SANA, "method.times.mean=0.2"),
    "icons_lcm.yaml": _DISCRETE,
    "icons_pcm.yaml": _DISCRETE,
    "icons_dmd2.yaml": ("student.guidance_embeds_scale=null", "optimizer.cooldown_steps=0"),
}
"""What all arms but the tuned ones take in the place of what configs/ has for icons, unless they change it: as
published for Sana (guidance embedding, route, law of times), r = 1, and steps of 120 samples at one learning rate."""
_NO_MATTER = ("out", "log", "checkpoint", "profile", "parallel")
"""Sections that change nothing of the student."""


@dataclass(frozen=True)
class Arm:
    """A network that is measured: a trained student, or one that is not trained (`net`).

    `tuned`: with the configuration in configs/ as it is, without `_PUBLISHED` over it. `change`: overrides of either,
    as on a command line. `shares`: settings in steps, given as shares of the run's steps. `equal`: what it has as many
    of, a step and a run, as without `change`. Arms with the same resolved configuration are one training, whatever they
    are called.
    """

    name: str
    what: str
    config: str = "icons.yaml"
    change: tuple[str, ...] = ()
    shares: tuple[tuple[str, float], ...] = ()
    net: str = "trained"  # or "teacher", "untrained"
    tuned: bool = False
    equal: Literal["samples", "prompts"] = "samples"

    @property
    def trained(self) -> bool:
        return self.net == "trained"


def _cooled(final: float) -> Arm:
    # The paper cools r down from step 15,000 to 17,000 of 20,000; the warm-up is that of all arms.
    shares = (("method.r.cooldown_start", 0.75), ("method.r.cooldown_steps", 0.1))
    what = f"r warms up to 1 and cools down to {final:g} between 75 % and 85 % of the steps"
    return Arm(f"r_{final:g}", what, change=(f"method.r.final={final}",), shares=shares)


def _route(kind: str) -> Arm:
    return Arm(f"route_{kind}", f"{kind} routes", change=(f"method.route.kind={kind}",))


def _points(points: int, equal: Literal["samples", "prompts"] = "samples") -> Arm:
    name = f"points_{points}" + ("_same_prompts" if equal == "prompts" else "")
    return Arm(name, f"routes of {points} points", change=(f"method.route.points={points}",), equal=equal)


ARMS = {
    arm.name: arm
    for arm in (
        Arm("tbcm", "TBCM with the route and guidance embedding published for Sana, r = 1"),
        Arm("scm", "sCM on the real images", "icons_scm.yaml"),
        Arm("sprint", "Sana-Sprint (sCM + latent adversarial loss)", "icons_sprint.yaml"),
        Arm("lcm", "LCM on the teacher's trajectories", "icons_lcm.yaml"),
        Arm("pcm_1", "PCM of one phase, with its adversarial loss", "icons_pcm.yaml", ("method.phases=1",)),
        Arm("pcm_4", "PCM of four phases, with its adversarial loss", "icons_pcm.yaml"),
        Arm(
            "dmd2",
            "DMD2 with its adversarial loss, on the real images",
            "icons_dmd2.yaml",
            ("method.adversary.weight=0.005", "data.images=icons"),
        ),
        Arm("dmd2_alone", "DMD2 without its adversarial loss, from prompts", "icons_dmd2.yaml"),
        Arm("tbcm_tuned", "TBCM as configs/icons.yaml has it", tuned=True),
        Arm("scm_tuned", "sCM as configs/icons_scm.yaml has it", "icons_scm.yaml", tuned=True),
        Arm("sprint_tuned", "Sana-Sprint as configs/icons_sprint.yaml has it", "icons_sprint.yaml", tuned=True),
        _route("random"),
        _route("logit_normal"),
        _route("reference"),
        _points(8),
        _points(12),
        _points(16),
        _points(20),
        _points(8, "prompts"),
        _points(12, "prompts"),
        _points(20, "prompts"),
        _cooled(0.25),
        _cooled(0.5),
        _cooled(0.75),
        Arm("r_1", "r warms up to 1 and stays", change=("method.r.final=1.0", "method.r.cooldown_start=null")),
        Arm(
            "r_0.75_warmup",
            "r warms up straight to 0.75",
            change=("method.r.final=0.75", "method.r.cooldown_start=null"),
        ),
        Arm("untrained", "the student before training", net="untrained"),
        Arm("teacher", "the guided teacher", net="teacher"),
    )
}


def config_of(arm: Arm, seed: int, budget: int, out: Path | str = "unused") -> Config:
    """The run of an arm that optimises about `budget` samples, or as many prompts as that takes without its `change`.

    A step optimises as many samples as without `change` (an arm with other routes takes other numbers of prompts for
    it), steps are rounded to the budget, and what is stated in steps keeps its share of the run.
    """
    path, base = CONFIGS / arm.config, base_of(arm)
    changed = load_config(path, [*_pins(arm), *arm.change])
    prompts, each = changed.train.prompts_per_step, samples_per_prompt(base if arm.equal == "prompts" else changed)
    if prompts == base.train.prompts_per_step:
        prompts = max(1, round(prompts * samples_per_prompt(base) / each))
    steps = max(1, round(budget / (prompts * each)))
    schedule: dict[str, Any] = {
        key: _scaled(changed, key, steps / changed.train.steps)
        for key in _IN_STEPS
        if _setting(changed, key)
        and not (key == "method.r.cooldown_steps" and _setting(changed, "method.r.cooldown_start") is None)
    }
    given = {each.partition("=")[0] for each in arm.change}
    shares = [*(each for each in _WARM_UPS.get(arm.config, ()) if each[0] not in given), *arm.shares]
    schedule |= {key: max(1, round(share * steps)) for key, share in shares}
    return load_config(
        path,
        [
            *_pins(arm),
            *arm.change,
            *(f"{key}={value}" for key, value in schedule.items()),
            f"out={out}",
            f"train.seed={seed}",
            f"train.steps={steps}",
            f"train.prompts_per_step={prompts}",
            "train.max_minutes=null",
            "log.preview_every=0",
            f"log.every={max(1, min(10, steps // 8))}",
            f"checkpoint.every={max(1, steps // 8)}",
            "checkpoint.keep_last=1",
        ],
    )


def base_of(arm: Arm) -> Config:
    """What an arm changes, at the length and seed of configs/."""
    return load_config(CONFIGS / arm.config, _pins(arm))


def samples_per_prompt(config: Config) -> int:
    """Of a route's points all train, in TBCM all but the first (its weight at t = pi/2 is 0); an image trains at one
    time."""
    return config.method.points - isinstance(config.method, Tbcm)


def samples(config: Config) -> int:
    """That a run optimises."""
    return config.train.steps * config.train.prompts_per_step * samples_per_prompt(config)


def stated(config: Config) -> dict[str, Any]:
    """What of a configuration decides the result, but for the seed, where it differs from the defaults."""
    tree = config.model_dump(mode="json", exclude_defaults=True)
    for section in _NO_MATTER:
        tree.pop(section, None)
    tree.get("train", {}).pop("seed", None)
    return tree


def recipe(arm: Arm, config: Config) -> str:
    """Eight digits that are equal for arms with the same result at equal seeds. A changed default is not noticed: what
    matters is to be stated in the configuration's file."""
    tree = stated(config)
    if not arm.trained:
        guidance = config.method.guidance
        tree = {"net": arm.net, "teacher": tree["teacher"], "text": tree.get("text"), "guidance": guidance}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:8]


def _pins(arm: Arm) -> tuple[str, ...]:
    return () if arm.tuned else _PUBLISHED[arm.config]


def _setting(config: Config, key: str) -> Any:
    """None where the method has no such setting."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part, None)
    return value


def _scaled(config: Config, key: str, by: float) -> float:
    """A number of steps stays a whole one, and at least 1."""
    value = _setting(config, key)
    return max(1, round(value * by)) if isinstance(value, int) else value * by
