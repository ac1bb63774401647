"""Every family as a student: derivative, gradients, guidance."""

from __future__ import annotations

import copy

import pytest
import torch
from families.test_teachers import W, network
from families.tiny import BUILDERS, make
from families.wide import Wide
from torch import Tensor, nn

from tbcm.method.types import Condition
from tbcm.models.embedders import fold_guidance, time_embedders
from tbcm.models.families.rows import family_of
from tbcm.models.network import DiffusersNetwork

NAMES = sorted(BUILDERS)


def prepared(name: str, dtype: torch.dtype = torch.float64) -> tuple[DiffusersNetwork, Condition, Tensor, Tensor]:
    """A student of the tiny teacher, the condition of two prompts, and two points (u, t) each."""
    tiny = make(name, dtype)
    teacher, latents = network(tiny)
    family = family_of(type(tiny.pipe).__name__)
    condition, _ = family.encode(tiny.pipe, tiny.prompts, **tiny.size)
    backbone = copy.deepcopy(teacher.backbone).requires_grad_()
    torch.manual_seed(0)
    student = DiffusersNetwork(
        backbone, teacher.family, teacher.formulation, latents[:-2], guided=True, logvar=True
    ).to(dtype)
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(4, *family.layout.shape(latents), generator=generator, dtype=torch.float64).to(dtype)
    return student, condition, u, torch.tensor([0.3, 0.7, 1.1, 1.4], dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
def test_the_derivative_is_that_of_finite_differences(name: str) -> None:
    student, condition, u, t = prepared(name)
    w = torch.full((4,), W, dtype=u.dtype)
    du = torch.randn(u.shape, generator=torch.Generator().manual_seed(2), dtype=u.dtype)
    dt, h = torch.tensor([0.4, -0.2, 0.3, 0.1], dtype=u.dtype), 1e-6
    with Wide(), torch.no_grad():
        dF = student(u, t, condition, w, (du, dt)).dF
        ahead, behind = (student(u + s * du, t + s * dt, condition, w).F for s in (h, -h))
    difference = (ahead - behind) / (2 * h)
    assert dF is not None and not dF.requires_grad
    bound = 1e-3 if name == "sana" else 1e-5  # its attention has ReLUs, whose kinks differences straddle
    assert float((dF - difference).norm() / difference.norm()) < bound


@pytest.mark.parametrize("name", NAMES)
def test_one_pass_has_the_value_and_the_gradients_of_the_plain_network(name: str) -> None:
    student, condition, u, t = prepared(name)
    if student.guidance_embedding is not None:
        for layer in student.guidance_embedding.last:
            nn.init.normal_(layer.weight, std=0.1)
    assert student.logvar_head is not None
    nn.init.normal_(student.logvar_head.weight)
    w = torch.full((4,), W, dtype=u.dtype)
    tangents = torch.randn_like(u), torch.ones_like(t)
    found = []
    for given in (None, tangents):
        student.zero_grad()
        answer = student(u, t, condition, w, given)
        assert answer.logvar is not None
        (answer.F.square().sum() + answer.logvar.sum()).backward()
        gradients = {k: p.grad.clone() for k, p in student.named_parameters() if p.grad is not None}
        found.append((answer.F.detach(), answer.logvar.detach(), gradients))
    (F, logvar, gradients), (F_one, logvar_one, gradients_one) = found
    torch.testing.assert_close(F_one, F, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logvar_one, logvar, rtol=1e-6, atol=1e-6)
    assert gradients_one.keys() == gradients.keys()
    assert len(gradients) > 0.9 * len([*student.parameters()]), "weights that no gradient reaches"
    largest = max(float(g.abs().max()) for g in gradients.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradients_one[key], gradient, rtol=1e-5, atol=1e-6 * largest, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_guidance_starts_at_nothing_and_folds_into_the_backbone(name: str) -> None:
    student, condition, u, t = prepared(name)
    w = torch.full((4,), W, dtype=u.dtype)
    with torch.no_grad():
        other = torch.full_like(w, 2.0)
        if student.guidance_embedding is None:
            assert name == "flux"
            assert not torch.equal(student(u, t, condition, w).F, student(u, t, condition, other).F)
            return
        plain = student(u, t, condition, w).F
        teacher = DiffusersNetwork(
            copy.deepcopy(student.backbone), student.family, student.formulation, student.channels
        )
        torch.testing.assert_close(plain, teacher(u, t, condition).F, rtol=0, atol=0)
        for layer in student.guidance_embedding.last:
            nn.init.normal_(layer.weight, std=0.3)
        guided = student(u, t, condition, w).F
        assert float((guided - plain).norm() / plain.norm()) > 1e-3
        if name == "flux2":
            with pytest.raises(Exception, match="has no bias"):
                fold_guidance(student.backbone, student.guidance_embedding, W)
            return
        backbone = copy.deepcopy(student.backbone)
        fold_guidance(backbone, student.guidance_embedding, W)
        folded = DiffusersNetwork(backbone, student.family, student.formulation, student.channels)
        torch.testing.assert_close(folded(u, t, condition).F, guided, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_times_that_half_precision_cannot_tell_apart_are_told_apart(name: str) -> None:
    """With weights in bf16: of 64 times within 0.01 of each other, bf16 knows 4."""
    student, condition, u, _ = prepared(name, torch.bfloat16)
    t = torch.atan2(s := torch.linspace(0.90, 0.91, 64), 1 - s)
    embedded: list[Tensor] = []

    class Seen(Exception):  # noqa: N818
        """The rest of the pass is not looked at."""

    def look(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        embedded.append(args[0])
        raise Seen

    time_embedders(student.backbone)[0].module.register_forward_hook(look)
    with torch.no_grad(), pytest.raises(Seen):
        student(u[:1].float().expand(64, -1, -1, -1), t, condition, torch.full((64,), W))
    distinct = len({tuple(row.flatten().tolist()) for row in embedded[0].float()})
    assert distinct >= 40, f"{distinct} of 64"
