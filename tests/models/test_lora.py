"""Sana students with adapters: shared weights, exact start, derivative and gradients, targets."""

from __future__ import annotations

import copy
import sys
from functools import partial
from typing import Any

import pytest
import torch
from models.sana.test_tangent import WAYS
from sana_cases import Batch, backbone_of, every_backbone
from torch import Tensor, nn

from tbcm.config.sections import Lora
from tbcm.errors import UserError
from tbcm.models.fp8 import to_fp8
from tbcm.models.loading import freeze
from tbcm.models.lora import DEFAULT_TARGETS, adapted, factors, matching, merge, tied
from tbcm.models.sana.network import SanaTrigFlow
from tbcm.models.sana.students import lora_student_from_teacher

RANK, ALPHA = 3, 4.5


def teacher_of(kind: str, dtype: torch.dtype = torch.float32) -> SanaTrigFlow:
    net = SanaTrigFlow(backbone_of(kind).to(dtype), timestep_scale=1.0, differentiable=False)
    freeze(net)
    return net


def student_of(teacher: SanaTrigFlow, **options: Any) -> SanaTrigFlow:
    torch.manual_seed(0)
    lora = Lora(rank=RANK, alpha=ALPHA, targets=options.pop("targets", None))
    return lora_student_from_teacher(teacher, lora, **options)


def moved(student: SanaTrigFlow) -> SanaTrigFlow:
    """As if trained: nothing that is trained is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return student


def merged(student: SanaTrigFlow) -> SanaTrigFlow:
    """A plain network that has the adapters in its weights."""
    plain = copy.deepcopy(student)
    merge(plain)
    return plain.requires_grad_()


@every_backbone
def test_it_starts_as_its_teacher_exactly(kind: str) -> None:
    """But for the rounding of a teacher's own attention, which is written in another way than a student's."""
    batch, teacher = Batch(), teacher_of(kind)
    student = student_of(teacher)
    same = SanaTrigFlow(tied(teacher.backbone), timestep_scale=1.0)
    with torch.no_grad():
        F, wanted, own = (batch.predict(net, tangents=False).F for net in (student, same, teacher))
        assert torch.equal(F, wanted)
        torch.testing.assert_close(F, own)
        assert (batch.predict(moved(student), tangents=False).F - own).norm() > 0.01 * own.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_teacher_and_student_are_one_backbone_in_memory(dtype: torch.dtype) -> None:
    teacher = teacher_of("plain", dtype)
    before, state = Batch().predict(teacher, tangents=False).F, copy.deepcopy(teacher.state_dict())
    student = student_of(teacher)
    own = {id(tensor) for tensor in (*teacher.parameters(), *teacher.buffers())}
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert {id(p) for p in student.parameters() if not p.requires_grad} == {id(p) for p in teacher.parameters()}
    assert all(id(buffer) in own for buffer in student.buffers())
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert all("lora_" in name or "guidance_embedder" in name or "logvar_head" in name for name in trained)
    assert sum(p.numel() for p in trained.values()) < sum(p.numel() for p in teacher.parameters())
    moved(student)
    assert torch.equal(Batch().predict(teacher, tangents=False).F, before)
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())


def test_a_teacher_that_embeds_guidance_keeps_its_embedding_frozen() -> None:
    student = student_of(teacher_of("guidance"))
    assert not any(p.requires_grad for p in student.backbone.time_embed.guidance_embedder.parameters())
    with pytest.raises(UserError, match="the teacher embeds guidance itself"):
        student_of(teacher_of("guidance"), guidance_embeds_scale=1.0)


EVERYWHERE = r".*(to_[qkv]|to_out\.0|conv_inverted|conv_point|linear_[12]|linear|proj_out)"
"""Of all kinds that Sana's rules know."""


@pytest.mark.usefixtures("double_throughout")
@every_backbone
@pytest.mark.parametrize("derivative", ["dual", "jvp"])
def test_the_derivative_is_that_of_finite_differences(kind: str, derivative: str) -> None:
    student = moved(student_of(teacher_of(kind), derivative=derivative, targets=EVERYWHERE)).double()
    batch, h = Batch(torch.float64), 1e-5

    @torch.no_grad()
    def at(step: float) -> Tensor:
        return student(batch.u + step * batch.du, batch.t + step * batch.dt, batch.condition, batch.guidance).F

    expected = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    dF = batch.predict(student).dF
    assert dF is not None and not dF.requires_grad
    assert (dF - expected).norm() < 1e-7 * expected.norm()


@pytest.mark.usefixtures("double_throughout")
@pytest.mark.parametrize("kind", ["plain", "patch2"])
def test_every_way_has_the_values_and_gradients_of_the_plain_merged_network(kind: str) -> None:
    """Of W + s B A: with G the gradient of the whole, that of A is s B^T G, and that of B is s G A^T."""
    batch, first = Batch(torch.float64), moved(student_of(teacher_of(kind), targets=EVERYWHERE)).double()
    plain = merged(first)
    expected, whole = batch.predict(plain), batch.gradients(plain)
    for way in (WAYS[i] for i in (1, 2, 4, 7)):  # both derivatives, checkpointing of each kind, one pass and two
        student = student_of(teacher_of(kind), targets=EVERYWHERE, **way).double()
        student.load_state_dict(first.state_dict())
        answer, gradients = batch.predict(student), batch.gradients(student)
        for name in ("F", "dF", "logvar"):
            torch.testing.assert_close(getattr(answer, name), getattr(expected, name), rtol=1e-9, atol=1e-10)
        assert {name for name, p in student.named_parameters() if p.requires_grad} == gradients.keys()
        for name, layer in adapted(student).items():
            (a, b), G = (x.flatten(1) for x in factors(layer)), whole[f"{name}.weight"].flatten(1)
            for part, wanted in (("lora_A", b.mT @ G), ("lora_B", ALPHA / RANK * G @ a.mT)):
                got = gradients[f"{name}.{part}.default.weight"].flatten(1)
                torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-9, msg=f"{way} {name} {part}")


def test_half_precision_weights_are_computed_with_under_autocast() -> None:
    """Weights in bf16 and adapters in fp32: about the answer of the fp32 network, and gradients in fp32."""
    batch = Batch()
    exact = moved(student_of(teacher_of("plain")))
    student = moved(student_of(teacher_of("plain", torch.bfloat16)))
    with torch.autocast("cpu", torch.bfloat16):
        answer, gradients = batch.predict(student), batch.gradients(student)
    reference = batch.predict(exact)
    for got, wanted in ((answer.F, reference.F), (answer.dF, reference.dF)):
        assert got is not None and wanted is not None
        assert (got.float() - wanted).norm() < 0.05 * wanted.norm()
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiler_can_trace_blocks_with_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, values and gradients; what a back end makes of its graphs is not for this test."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    batch, answers, teacher = Batch(), [], teacher_of("plain")
    for compiled in (False, True):
        student = moved(student_of(teacher, compiled=compiled))
        answers.append((batch.predict(student).F, batch.predict(student).dF, batch.gradients(student)))
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-4, atol=1e-4)


def test_an_fp8_teacher_has_copies_beside_the_shared_weights() -> None:
    batch, teacher = Batch(), teacher_of("plain")
    student = moved(student_of(teacher))
    before = batch.predict(student).F
    assert to_fp8(teacher, smallest=16)
    assert torch.equal(batch.predict(student).F, before)
    assert batch.predict(teacher, tangents=False).F.isfinite().all()


# Targets

NAMES = ["a_blocks.0.attn.to_q", "a_blocks.10.attn.to_q", "a_blocks.0.attn.to_out.0", "proj_out", "a_blocks.0.proj_out"]


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["to_q"], [0, 1]),
        (["attn.to_q", "to_out.0"], [0, 1, 2]),
        (["proj_out"], [3, 4]),
        (r".*\.0\.attn\.to_q", [0]),
        (r".*proj_out", [3, 4]),
        ("proj_out", [3]),
        (NAMES, [0, 1, 2, 3, 4]),
    ],
)
def test_targets_are_matched_as_peft_does(targets: str | list[str], found: list[int]) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    assert matching(targets, NAMES, "X") == [NAMES[i] for i in found]
    config = LoraConfig(target_modules=targets)
    assert [name for name in NAMES if check_target_module_exists(config, name)] == [NAMES[i] for i in found]


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["to_q", "to_z"], "'to_z' matches no layer of SanaTransformer2DModel; .* attn1.to_q"),
        ("to_q", "'to_q' matches no layer .* whole names such as .* There are: .*ff.conv_inverted"),
        ("(", "no regular expression"),
        (["patch_embed.proj"], "'patch_embed.proj' matches no layer"),
        (["ff.conv_depth"], "matches no layer"),
        (["norm_q"], "matches no layer"),
    ],
)
def test_targets_that_match_nothing_are_one_line_which_names_what_there_is(targets: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        student_of(teacher_of("plain"), targets=targets)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 2000


def test_the_default_is_attention_and_feed_forward() -> None:
    student = student_of(teacher_of("plain"))
    kinds = {name.split(".", 3)[3] for name in adapted(student)}
    attention = {f"attn{i}.{layer}" for i in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")}
    assert kinds == {*attention, "ff.conv_inverted", "ff.conv_point"} and DEFAULT_TARGETS.startswith(".*")
    assert len(adapted(student)) == len(kinds) * len(student.blocks)


def test_without_peft_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "tbcm.models.lora")
    with pytest.raises(UserError, match=r"student\.lora needs peft .*: pip install tbcm\[lora\]"):
        student_of(teacher_of("plain"))


def test_a_dual_rule_is_known_for_what_peft_makes_of_a_linear_layer() -> None:
    """And for none of its other layers: those are refused rather than passed over."""
    from peft import LoraConfig, inject_adapter_in_model

    from tbcm.models.differentiation.dual import dual

    net = nn.Sequential(nn.Embedding(3, 4))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), net)
    x = torch.tensor([1])
    with pytest.raises(TypeError, match="no tangent rule"):
        dual(net[0], (x, x))
