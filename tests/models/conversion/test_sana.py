"""Sana's weights as NVlabs publishes them become a teacher with the same outputs."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
from helpers import tiny_sana
from published import sana
from safetensors.torch import load_file, save_file
from tiny import tiny_vae, write_teacher
from torch import Tensor

from tbcm.errors import UserError
from tbcm.models.conversion.folder import convert
from tbcm.models.families.pipeline import open_pipeline
from tbcm.models.pipeline import Pipeline
from tbcm.models.sana.published import from_published
from tbcm.models.sana.students import load_teacher

CPU = torch.device("cpu")
NORMS = {"qk_norm": "rms_norm_across_heads"}
VERSIONS: dict[str, dict[str, Any]] = {
    "1.0": {"qk_norm": None},
    "1.5": NORMS,
    "sprint": {**NORMS, "guidance_embeds": True},
}
CAPTIONS = {"caption_channels": 384, "timestep_scale": 0.001}


def like(folder: Path, version: str) -> Path:
    """A pipeline of that architecture, with other weights."""
    if version != "sprint":
        return write_teacher(folder, **VERSIONS[version])
    transformer = tiny_sana(**CAPTIONS, **VERSIONS[version])
    parts = {"tokenizer": None, "text_encoder": None, "vae": tiny_vae(), "transformer": transformer}
    SanaSprintPipeline(**parts, scheduler=SCMScheduler()).save_pretrained(folder)
    return folder


def source(version: str) -> Any:
    return tiny_sana(seed=1, **CAPTIONS, **VERSIONS[version]).eval()


def answer(model: Any, **more: Tensor) -> Tensor:
    torch.manual_seed(0)
    x, text, t = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 384), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        out: Tensor = model(x, encoder_hidden_states=text, timestep=t, return_dict=False, **more)[0]
    return out


@pytest.mark.parametrize("wrapped", ["safetensors", "state_dict"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_teacher_with_the_same_outputs(version: str, wrapped: str, tmp_path: Path) -> None:
    model, given = source(version), sana(source(version))
    if version == "sprint":
        given |= {"logvar_linear.weight": torch.ones(1, 16), "logvar_linear.bias": torch.ones(1)}
    if wrapped == "safetensors":
        save_file(given, file := tmp_path / "Sana.safetensors")
    else:
        torch.save({"state_dict": given}, file := tmp_path / "Sana.pth")
    report = convert(file, tmp_path / "out", str(like(tmp_path / "like", version)))
    assert report.converted == ["transformer"] and report.taken == ["scheduler", "vae"]
    ignored = {"pos_embed", "y_embedder.y_embedding"} | {key for key in given if key.startswith("logvar")}
    assert report.left_out.keys() == ignored
    teacher = Pipeline(str(tmp_path / "out"))
    more = {"guidance": torch.tensor([4.0, 5.0])} if version == "sprint" else {}
    loaded = teacher.load_transformer(torch.float32)
    assert torch.equal(answer(loaded.eval(), **more), answer(model, **more))
    assert open_pipeline(teacher) is teacher and load_teacher(teacher, torch.float32, CPU).embeds_guidance == bool(more)
    for part in ("vae", "scheduler"):
        for path in (tmp_path / "like" / part).iterdir():
            assert (tmp_path / "out" / part / path.name).read_bytes() == path.read_bytes()


def test_diffusers_names_are_taken_as_they_are_in_their_own_dtype(tmp_path: Path) -> None:
    model = source("1.5").bfloat16()
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "out", str(like(tmp_path / "like", "1.5")))
    (file,) = (tmp_path / "out" / "transformer").glob("*.safetensors")
    found = load_file(file)
    assert all(torch.equal(found[key], value) and found[key].dtype == torch.bfloat16 for key, value in found.items())
    assert found.keys() == model.state_dict().keys()


def test_a_trainings_checkpoint_and_its_average(tmp_path: Path) -> None:
    """With all that NVlabs' trainer keeps in it."""
    last, average = source("1.0"), tiny_sana(seed=2, **CAPTIONS, **VERSIONS["1.0"])
    generators = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    tree = {"state_dict": sana(last), "state_dict_ema": sana(average), "rng_state": generators, "epoch": 3}
    torch.save(tree | {"optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}}, tmp_path / "epoch_3.pth")
    folder = str(like(tmp_path / "like", "1.0"))
    for averaged, model in ((False, last), (True, average)):
        out = tmp_path / f"out-{averaged}"
        convert(tmp_path / "epoch_3.pth", out, folder, averaged=averaged, dtype=torch.float16)
        loaded = Pipeline(str(out)).load_transformer(torch.float32).state_dict()
        assert all(torch.equal(loaded[key], value.half().float()) for key, value in model.state_dict().items())
    torch.save({"state_dict": sana(last)}, tmp_path / "last.pth")
    with pytest.raises(UserError, match=r"last\.pth: holds no averaged weights \(state_dict_ema\)"):
        convert(tmp_path / "last.pth", tmp_path / "out", folder, averaged=True)


@pytest.mark.parametrize(
    ("version", "change", "words"),
    [
        ("1.5", {"blocks.1.attn.q_norm.weight": None}, r"1 missing \(transformer_blocks\.1\.attn1\.norm_q\.weight\)"),
        (
            "1.5",
            {"blocks.0.mlp.t_conv.weight": torch.ones(2)},
            r"1 not in the model \(blocks\.0\.mlp\.t_conv\.weight\)",
        ),
        ("1.0", {"cfg_embedder.mlp.0.bias": torch.ones(2)}, r"not in the model \(time_embed\.guidance_embedder"),
        ("1.0", {"t_block.1.bias": torch.ones(7)}, r"time_embed\.linear\.bias is \[7\] and should be \[96\]"),
        ("1.0", {"blocks.1.attn.qkv.weight": torch.tensor(1.0)}, r"3 of another shape \(.*attn1\.to_k\.weight is \[\]"),
        ("1.0", {"t_block.1.bias": torch.ones(96, dtype=torch.int8)}, "bias holds whole numbers: quantised"),
        ("1.0", {"t_block.1.bias": torch.ones(96).to(torch.float8_e4m3fn)}, r"has 8 bits .*: give --dtype bf16"),
    ],
)
def test_what_does_not_fit_is_one_line(
    version: str, change: dict[str, Tensor | None], words: str, tmp_path: Path
) -> None:
    given = {key: value for key, value in (sana(source(version)) | change).items() if value is not None}
    save_file(given, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=words) as caught:
        convert(tmp_path / "a.safetensors", tmp_path / "out", str(like(tmp_path / "like", version)))
    assert re.match(r".*/a\.safetensors: its transformer: ", str(caught.value))
    assert not (tmp_path / "out").exists() and {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "like"}


def test_a_pipeline_of_another_version_is_no_like(tmp_path: Path) -> None:
    """What diffusers' own conversion says nothing of: 1.5's norms of queries and keys."""
    save_file(sana(source("1.5")), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"8 not in the model .*attn1\.norm_k.*--like should be .* same architecture"):
        convert(tmp_path / "a.safetensors", tmp_path / "out", str(like(tmp_path / "like", "1.0")))


def test_of_1_0_diffusers_own_conversion_makes_the_same(tmp_path: Path) -> None:
    given, folder = sana(source("1.0")), like(tmp_path / "like", "1.0")
    theirs = SanaTransformer2DModel.from_single_file(dict(given), config=str(folder), subfolder="transformer")
    ours = from_published(given, guidance_embeds=False).tensors
    assert ours.keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.state_dict().items())
