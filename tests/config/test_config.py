"""What a configuration may say, and the one line that answers what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tbcm.config import Config, load_config
from tbcm.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
MINIMAL = "out: run\nteacher: {path: icons}\ndata: {prompts: icons}\n"


def load(tmp_path: Path, text: str = MINIMAL, *overrides: str) -> Config:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load_config(path, overrides)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_load_and_survive_printing(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert load(tmp_path, config.to_yaml()) == config


def test_the_published_recipe() -> None:
    c = load_config(CONFIGS / "sana.yaml")
    assert c.method.route.points == 16 and c.train.prompts_per_step == 32 and c.train.steps == 20_000
    assert c.method.guidance == [4.0, 4.5, 5.0] and c.method.sigma_data == 0.5 and c.method.tangent_c == 0.1
    assert (c.optimizer.name, c.optimizer.clip, c.optimizer.cooldown_steps) == ("came", 0.1, 0)
    assert c.method.route.kind == "reference" and c.method.route.per_prompt  # a rank had one prompt
    assert c.method.r.model_dump() == {
        "warmup_steps": 4000,
        "final": 0.75,
        "cooldown_start": 15000,
        "cooldown_steps": 2000,
    }


@pytest.mark.parametrize(("name", "stated"), [("", 1e-5), ("_1gpu", 1e-5), ("_scm", 2e-6), ("_sprint", 2e-6)])
def test_learning_rates_are_what_the_released_trainers_made_of_theirs(name: str, stated: float) -> None:
    """Times the root of the batch, of prompts or images, over 256 (`auto_lr`); 5,000 ticks of warm-up, 32 an update."""
    c = load_config(CONFIGS / f"sana{name}.yaml")
    effective = stated * (c.train.prompts_per_step / 256) ** 0.5
    assert c.optimizer.lr == pytest.approx(effective, rel=2e-3)
    assert c.optimizer.warmup_steps == 5000 // 32
    assert c.optimizer.weight_decay == 0 and c.optimizer.betas in (None, [0.9, 0.999, 0.9999])


def test_the_published_baselines() -> None:
    scm, sprint = (load_config(CONFIGS / f"sana_{name}.yaml") for name in ("scm", "sprint"))
    for c in (scm, sprint):
        assert c.train.prompts_per_step == 16 * 32 and c.method.r.final == 1 and c.method.r.cooldown_start is None
        assert (c.method.times.mean, c.method.times.std) == (0.2, 1.6)
    a = sprint.method.adversary
    assert (a.weight, a.max_time, a.layers, a.noise_mean, a.noise_std) == (0.5, 0.5, [2, 8, 14, 19], -0.6, 1)
    assert (a.optimizer, a.lr, a.clip) == ("came", sprint.optimizer.lr, sprint.optimizer.clip)
    # Its steps are updates of the student and of the discriminator in turn.
    assert (2 * sprint.train.steps, 2 * sprint.method.r.warmup_steps) == (scm.train.steps, scm.method.r.warmup_steps)


def test_one_gpu_is_the_same_run_as_32() -> None:
    many, one = load_config(CONFIGS / "sana.yaml"), load_config(CONFIGS / "sana_1gpu.yaml")
    for section in ("teacher", "text", "method", "student", "optimizer", "ema"):
        assert getattr(many, section) == getattr(one, section)
    assert many.train.prompts_per_step == one.train.prompts_per_step


def test_scientific_notation_is_a_number(tmp_path: Path) -> None:
    """PyYAML reads 1e-5 as a string."""
    assert yaml.safe_load("1e-5") == "1e-5"
    assert load(tmp_path, MINIMAL + "optimizer: {lr: 1e-5}").optimizer.lr == 1e-5
    assert load(tmp_path, MINIMAL, "optimizer.lr=2e-4").optimizer.lr == 2e-4


def test_overrides_win_and_take_yaml(tmp_path: Path) -> None:
    c = load(tmp_path, MINIMAL + "train: {steps: 5}", "train.steps=7", "method.guidance=[1, 2]", "ema.kind=halflife")
    assert c.train.steps == 7 and c.method.guidance == [1.0, 2.0] and c.ema.kind == "halflife"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=3", ["train.stepz", "3", "steps", "max_minutes"]),
        ("train.steps=abc", ["train.steps", "'abc'", "integer"]),
        ("train.steps=0", ["train.steps", "0", "greater than 0"]),
        ("optimizer.lr=-1", ["optimizer.lr", "-1", "greater than 0"]),
        ("optimizer.lr=.nan", ["optimizer.lr", "nan", "finite"]),
        ("method.route.kind=straight", ["method.route.kind", "'straight'", "reference", "logit_normal", "random"]),
        ("method.route.points=1", ["method.route.points", "1", "greater than or equal to 2"]),
        ("method.guidance=[]", ["method.guidance", "[]", "at least 1"]),
        ("method.r.final=1.5", ["method.r.final", "1.5", "less than or equal to 1"]),
        ("optimizer.betas=[0.9]", ["optimizer", "0.9", "3 betas"]),
        ("ema.sigma_rel=2", ["ema.sigma_rel", "2", "less than 0.28"]),
        ("student=fast", ["student", "'fast'"]),
        ("train={prompts_per_rollout: 4, prompts_per_micro_batch: 3}", ["prompts_per_micro_batch=3", "divide", "=4"]),
        ("train.steps.more=1", ["train.steps", "integer"]),
        ("nonsense", ["nonsense", "key=value"]),
        ("train.steps=[", ["train.steps", "YAML"]),
        ("surprise=1", ["surprise", "teacher", "train"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, MINIMAL, override)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [("just a string", "mapping"), ("a: [", "YAML"), ("out: x\ndata: {prompts: p}\n", "teacher is missing")],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(tmp_path, text)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: cannot read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_config(tmp_path / "binary.yaml")
