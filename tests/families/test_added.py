"""The worked example of docs/backbones.md: a family that is not in the table, added by that text alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from families import test_exports, test_students, test_teachers, tiny

from tbcm.models.families import rows

TEXT = (Path(__file__).parents[2] / "docs" / "backbones.md").read_text(encoding="utf-8")
EXAMPLE = TEXT.split("### An example")[1].split("```python\n")[1].split("```")[0]
NAME = "cogview3plus"


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rows, "FAMILIES", rows.FAMILIES.copy())
    assert "CogView3PlusPipeline" not in rows.FAMILIES and NAME not in tiny.BUILDERS
    exec(EXAMPLE, {"__name__": "example"})
    yield
    del tiny.BUILDERS[NAME]


def test_it_is_short() -> None:
    assert len(EXAMPLE.splitlines()) <= 40


@pytest.mark.parametrize("shape", ["square", "wide"])
def test_it_is_a_teacher(shape: str) -> None:
    test_teachers.test_velocity_and_step_are_the_pipelines_own(NAME, shape)


def test_it_is_a_student() -> None:
    test_students.test_the_derivative_is_that_of_finite_differences(NAME)
    test_students.test_one_pass_has_the_value_and_the_gradients_of_the_plain_network(NAME)
    test_students.test_guidance_starts_at_nothing_and_folds_into_the_backbone(NAME)
    test_students.test_times_that_half_precision_cannot_tell_apart_are_told_apart(NAME)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_plain_diffusers_samples_its_student(steps: int) -> None:
    test_exports.test_plain_diffusers_samples_as_this_package_does(NAME, steps)
