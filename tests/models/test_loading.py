"""The student that is made from a teacher."""

from __future__ import annotations

import pytest
import torch
from sana_cases import Batch, backbone_of
from torch import nn

from tbcm.errors import UserError
from tbcm.models.loading import student_from_teacher
from tbcm.models.sana import SanaTrigFlow


def teacher(kind: str) -> SanaTrigFlow:
    return SanaTrigFlow(backbone_of(kind), timestep_scale=1.0, differentiable=False)


@pytest.mark.parametrize("scale", [None, 1.0])
def test_a_student_starts_equal_to_the_conditional_teacher_whatever_the_guidance(scale: float | None) -> None:
    batch, of = Batch(), teacher("plain")
    student = student_from_teacher(of, guidance_embeds_scale=scale)
    torch.testing.assert_close(batch.predict(student).F, batch.predict(of, tangents=False).F)


def cosine_of_embeddings(student: SanaTrigFlow, one: float, other: float) -> float:
    assert student.guidance_scale is not None
    project = student.backbone.time_embed.guidance_condition_proj
    a, b = project(torch.tensor([one, other]) * student.guidance_scale)
    return nn.functional.cosine_similarity(a, b, dim=0).item()


@pytest.mark.parametrize("scale", [None, 0.5, 1.0])
def test_guidance_is_embedded_times_its_scale(scale: float | None) -> None:
    """Sines and cosines of 128 frequencies 10000^(-k/128): of guidances 3 and 5 their mean product is the mean of
    cos(2 scale f_k). By Sana's own 0.1 that is 0.999, and nothing in a short run tells them apart."""
    student = student_from_teacher(teacher("plain"), guidance_embeds_scale=scale)
    frequencies = 10000.0 ** (-torch.arange(128) / 128)
    expected = torch.cos(2 * (scale or 0.1) * frequencies).mean().item()
    assert student.backbone.config.guidance_embeds_scale == (scale or 0.1)  # SanaSprintPipeline reads it there
    assert cosine_of_embeddings(student, 3.0, 5.0) == pytest.approx(expected, abs=1e-6)
    assert expected > 0.998 if scale is None else expected < 0.98


def test_a_teacher_that_embeds_guidance_keeps_its_scale() -> None:
    assert student_from_teacher(teacher("guidance"), guidance_embeds_scale=0.1).guidance_scale == 0.1
    with pytest.raises(UserError, match=r"student\.guidance_embeds_scale = 1: the teacher embeds guidance itself"):
        student_from_teacher(teacher("guidance"), guidance_embeds_scale=1.0)
