"""A configuration begins from its teacher's card, and its own keys win."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tbcm.config import load_config
from tbcm.config.card import CARD
from tbcm.config.paths import teacher_folder
from tbcm.errors import UserError
from tbcm.icons.bundle import TEACHER_CARD

SAID = {"resolution": 48, "teacher": {"null_mask": "own", "timestep_scale": 7.0}, "text": {"max_tokens": 9}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Of a teacher with a card, in which it changes one key."""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / CARD).write_text(yaml.safe_dump(SAID))
    config = {
        "out": "run",
        "data": {"prompts": "p.txt"},
        "teacher": {"path": str(tmp_path / "teacher"), "timestep_scale": 5.0},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "c.yaml"


def test_what_the_configuration_leaves_out_is_the_cards(file: Path) -> None:
    config = load_config(file, ["text.precision=fp32"])
    assert (config.resolution, config.teacher.null_mask, config.text.max_tokens) == (((48, 48),), "own", 9)
    assert config.teacher.timestep_scale == 5.0


def test_an_override_wins_too_and_may_choose_a_teacher_without_a_card(file: Path) -> None:
    assert load_config(file, ["text.max_tokens=11", "resolution=64"]).text.max_tokens == 11
    other = load_config(file, [f"teacher.path={file.parent}"])
    assert (other.resolution, other.teacher.null_mask, other.text.max_tokens) == (((1024, 1024),), "conditional", 300)


def test_settings_of_another_method_than_the_configurations_are_not_taken(file: Path) -> None:
    (file.parent / "teacher" / CARD).write_text("method: {guidance: [3.0], brightness_threshold: 0.5}")
    assert list(load_config(file).method.guidance) == [3.0]
    images = ["method.name=scm", "data.images=icons"]
    assert load_config(file, images).method.guidance == load_config("configs/sana_scm.yaml").method.guidance


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("teacher: {nul_mask: own}", r"on .*tbcm_teacher\.yaml\): unknown key 'teacher\.nul_mask'"),
        ("train: {steps: 1}", r"tbcm_teacher\.yaml: 'train' is none of a teacher's: resolution"),
        ("out: x", r"tbcm_teacher\.yaml: 'out' is none"),
        ("teacher: [", r"tbcm_teacher\.yaml: not YAML"),
        ("- 1", r"tbcm_teacher\.yaml: a configuration is a mapping"),
    ],
)
def test_a_malformed_card_is_one_line(file: Path, card: str, message: str) -> None:
    (file.parent / "teacher" / CARD).write_text(card)
    with pytest.raises(UserError, match=message):
        load_config(file)


def test_the_shipped_teacher_has_the_card_that_its_recipe_writes() -> None:
    assert (teacher_folder("icons") / CARD).read_text() == TEACHER_CARD
