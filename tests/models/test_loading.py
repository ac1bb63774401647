"""The student that is made from a teacher."""

from __future__ import annotations

import pytest
import torch
from sana_cases import Batch, backbone_of
from torch import nn

from tbcm.errors import UserError
from tbcm.models.sana.network import SanaTrigFlow
from tbcm.models.sana.students import student_from_teacher


def teacher(kind: str) -> SanaTrigFlow:
    return SanaTrigFlow(backbone_of(kind), timestep_scale=1.0, differentiable=False)


@pytest.mark.parametrize("scale", [None, 1.0])
def test_a_student_starts_equal_to_the_conditional_teacher_whatever_the_guidance(scale: float | None) -> None:
    batch, of = Batch(), teacher("plain")
    student = student_from_teacher(of, guidance_embeds_scale=scale)
    torch.testing.assert_close(batch.predict(student).F, batch.predict(of, tangents=False).F)


def test_guidance_is_embedded_times_its_scale() -> None:
    """Ten times the scale is ten times the guidance, once the embedding says anything."""
    students = {}
    for scale in (None, 1.0):
        torch.manual_seed(0)
        students[scale] = student_from_teacher(teacher("plain"), guidance_embeds_scale=scale)
        nn.init.normal_(students[scale].backbone.time_embed.guidance_embedder.linear_2.weight)
    assert students[1.0].backbone.config.guidance_embeds_scale == 1.0  # SanaSprintPipeline reads it there
    batch, tenfold = Batch(), Batch()
    tenfold.guidance = 10 * batch.guidance
    found = batch.predict(students[1.0]).F
    torch.testing.assert_close(found, tenfold.predict(students[None]).F)
    assert (found - batch.predict(students[None]).F).abs().max() > 1e-3


def test_a_teacher_that_embeds_guidance_keeps_its_scale() -> None:
    assert student_from_teacher(teacher("guidance"), guidance_embeds_scale=0.1).guidance_scale == 0.1
    with pytest.raises(UserError, match=r"student\.guidance_embeds_scale = 1: the teacher embeds guidance itself"):
        student_from_teacher(teacher("guidance"), guidance_embeds_scale=1.0)


def test_a_student_is_on_its_teachers_device() -> None:
    student = student_from_teacher(teacher("plain").to("meta"))
    assert {tensor.device.type for tensor in (*student.parameters(), *student.buffers())} == {"meta"}
