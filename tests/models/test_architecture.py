"""What of a configuration is supported: what is not is refused when a model is loaded, and what is computes as in
diffusers."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaTransformer2DModel
from helpers import TINY, random_condition, tiny_sana
from tiny import edit_json, write_teacher

from tbcm.errors import UserError
from tbcm.method.trigflow import flow_input, flow_output, flow_time
from tbcm.models.architecture import SanaTransformer, check_config
from tbcm.models.pipeline import Pipeline
from tbcm.models.sana.network import SanaTrigFlow
from tbcm.models.sana.students import load_teacher, student_from_teacher

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_teacher(tmp_path / "teacher")


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_teacher(Pipeline(str(folder)), torch.float32, CPU)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("norm_elementwise_affine", True),
        ("dropout", 0.1),
        ("qk_norm", "rms_norm"),
        ("qk_norm", "layer_norm"),
        ("out_channels", 8),
        ("cross_attention_dim", 32),
        ("patch_size", 3),
        ("patch_size", 0),
        ("num_layers", 10**9),
        ("num_attention_heads", True),
        ("guidance_embeds", "yes"),
        ("guidance_embeds_scale", 0.0),
        ("interpolation_scale", -1.0),
        ("interpolation_scale", "2"),
        ("mlp_ratio", float("nan")),
        ("norm_eps", None),
        ("sample_size", [8, 8]),
        ("timestep_scale", float("inf")),
    ],
)
def test_what_a_transformer_may_not_be_is_refused_by_key_and_value(folder: Path, key: str, value: Any) -> None:
    file = folder / "transformer" / "config.json"
    tree = json.loads(file.read_text()) | {key: value}
    file.write_text(json.dumps(tree))
    message = refused(folder)
    assert str(file) in message
    assert key in message
    assert json.dumps(value) in message or repr(value) in message


@pytest.mark.parametrize(
    ("key", "value"),
    [("latent_channels", 8), ("in_channels", 1), ("encoder_block_out_channels", [8]), ("scaling_factor", 0)],
)
def test_what_a_vae_may_not_be_is_refused_with_the_teacher(folder: Path, key: str, value: Any) -> None:
    edit_json(folder / "vae" / "config.json", **{key: value})
    assert key in refused(folder)


def test_other_classes_are_refused(folder: Path) -> None:
    edit_json(folder / "vae" / "config.json", _class_name="AutoencoderKL")
    assert "'AutoencoderKL'; supported: AutoencoderDC" in refused(folder)
    edit_json(folder / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    assert "its vae is 'AutoencoderKL'; supported: AutoencoderDC" in refused(folder)
    edit_json(folder / "model_index.json", transformer=["diffusers", "FluxTransformer2DModel"])
    assert "its transformer is 'FluxTransformer2DModel'" in refused(folder)


@pytest.mark.parametrize("change", [{"prediction_type": "epsilon"}, {"use_dynamic_shifting": True}, {"shift": "3"}])
def test_a_teacher_that_is_no_flow_matching_one_is_refused(folder: Path, change: dict[str, Any]) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", **change)
    assert next(iter(change)) in refused(folder)


def test_a_key_that_nobody_thought_of_may_have_its_default_alone() -> None:
    class Later(SanaTransformer2DModel):
        """Of a diffusers to come."""

        def __init__(self, gate: str = "none") -> None: ...

    own = inspect.signature(SanaTransformer2DModel.__init__).parameters
    added = inspect.signature(Later.__init__).parameters["gate"]
    Later.__init__.__signature__ = inspect.Signature([*own.values(), added])  # type: ignore[attr-defined]

    def check(**change: Any) -> None:
        check_config({**TINY, **change}, SanaTransformer, Later, "config.json")

    check()
    check(gate="none")
    with pytest.raises(UserError, match=r"config\.json: gate = 'tanh' is not supported: should be 'none'"):
        check(gate="tanh")


def test_unknown_keys_are_ignored_with_one_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_json(folder / "transformer" / "config.json", made_up=3)
    with caplog.at_level(logging.WARNING, "tbcm"):
        teacher = load_teacher(Pipeline(str(folder)), torch.float32, CPU)
        student_from_teacher(teacher)
    assert [record.message for record in caplog.records if "made_up" in record.message] == [
        f"{folder / 'transformer' / 'config.json'}: ignoring keys that this diffusers' SanaTransformer2DModel does not"
        " have: made_up"
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": True},
        {"num_cross_attention_heads": 3},
        {"out_channels": None},
        {"norm_eps": 0.1, "qk_norm": None},
        {"interpolation_scale": 2.0, "patch_size": 2, "sample_size": 4},
    ],
)
def test_what_is_supported_computes_as_diffusers_does(change: dict[str, Any]) -> None:
    backbone = tiny_sana(**change)
    check_config({**backbone.config}, SanaTransformer, SanaTransformer2DModel, "config.json")
    generator = torch.Generator().manual_seed(1)
    u, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([0.4, 1.3])
    condition = random_condition(2)
    s = flow_time(t)
    with torch.no_grad():
        velocity = backbone(
            flow_input(u, s), condition.tensors["embeds"], s, encoder_attention_mask=condition.tensors["mask"]
        ).sample
        expected = flow_output(flow_input(u, s), velocity, s)
        found = SanaTrigFlow(backbone, timestep_scale=1.0, differentiable=False)(u, t, condition)
    torch.testing.assert_close(found.F, expected, rtol=0, atol=2e-5)
