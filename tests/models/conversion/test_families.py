"""Fine-tunes of other families as people publish them: networks alone, and with text encoders and autoencoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import published
import pytest
import torch
from families.tiny import make
from published import Tensors
from safetensors.torch import save_file
from torch import nn

from tbcm.errors import UserError
from tbcm.models.conversion.filling import fill
from tbcm.models.conversion.folder import Report, convert
from tbcm.models.conversion.network import from_single_file
from tbcm.models.families.pipeline import FamilyPipeline, open_pipeline
from tbcm.models.pipeline import Pipeline

CPU = torch.device("cpu")


def other(model: Any) -> Any:
    """A copy with weights of its own, no two alike."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {prefix + key: value.contiguous() for key, value in tensors.items()}


def written(folder: Path, tensors: Tensors) -> Path:
    save_file(tensors, folder / "tuned.safetensors")
    return folder / "tuned.safetensors"


def like(name: str, folder: Path) -> str:
    make(name).pipe.save_pretrained(folder / "like")
    return str(folder / "like")


def converted(name: str, tensors: Tensors, folder: Path, **options: Any) -> tuple[Report, FamilyPipeline, Any]:
    """What was written, as a teacher, and as plain diffusers has it."""
    report = convert(written(folder, tensors), folder / "out", like(name, folder), **options)
    teacher = open_pipeline(Pipeline(str(folder / "out")))
    assert isinstance(teacher, FamilyPipeline)
    return report, teacher, diffusers.DiffusionPipeline.from_pretrained(folder / "out")


def assert_same(model: nn.Module, source: nn.Module) -> None:
    found, wanted = model.state_dict(), source.state_dict()
    assert found.keys() == wanted.keys()
    assert not [key for key, value in wanted.items() if not torch.equal(found[key], value)]


SCHEDULE = {key: torch.ones(3) for key in ("betas", "alphas_cumprod_prev", "sqrt_recipm1_alphas_cumprod", "logvar")}
OF_LDM = {**SCHEDULE, "model_ema.decay": torch.ones(1), "posterior_mean_coef1": torch.ones(3)}


@pytest.mark.parametrize("of", ["clip", "open_clip"])
def test_stable_diffusion_with_its_encoder_and_autoencoder(of: str, tmp_path: Path) -> None:
    """1.5, and 2 whose file has one layer more than is run, and a projection."""
    pipe = make("sd15").pipe
    unet, vae, text = (other(part) for part in (pipe.unet, pipe.vae, pipe.text_encoder))
    tensors = prefixed("model.diffusion_model.", published.unet(unet)) | OF_LDM
    tensors |= prefixed("first_stage_model.", published.autoencoder(vae))
    if of == "clip":
        tensors |= prefixed("cond_stage_model.transformer.", published.clip(text))
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(16)[None]
        ignored = {"text_model.embeddings.position_ids"}
    else:
        tensors |= prefixed("cond_stage_model.model.", published.open_clip(text))
        more = {"transformer.resblocks.3.ln_1.weight": torch.ones(16), "text_projection": torch.ones(16, 16)}
        tensors |= prefixed("cond_stage_model.model.", more)
        ignored = {"logit_scale", *more}
    report, teacher, plain = converted("sd15", tensors, tmp_path)
    assert report.converted == ["text_encoder", "unet", "vae"] and report.taken == ["scheduler", "tokenizer"]
    assert report.left_out.keys() == OF_LDM.keys() | ignored
    assert_same(teacher.load_network(torch.float32, CPU), unet)
    assert_same(teacher.load_vae(torch.float32), vae)
    assert_same(plain.text_encoder, text)


def test_sdxl(tmp_path: Path) -> None:
    pipe = make("sdxl").pipe
    names = "unet", "vae", "text_encoder", "text_encoder_2"
    unet, vae, one, two = (other(getattr(pipe, name)) for name in names)
    tensors = prefixed("model.diffusion_model.", published.unet(unet)) | {"denoiser.sigmas": torch.ones(9)}
    tensors |= prefixed("first_stage_model.", published.autoencoder(vae))
    tensors |= prefixed("conditioner.embedders.0.transformer.", published.clip(one))
    tensors |= prefixed("conditioner.embedders.1.model.", published.open_clip(two))
    report, teacher, plain = converted("sdxl", tensors, tmp_path)
    assert report.converted == sorted(names)
    assert_same(teacher.load_network(torch.float32, CPU), unet)
    for model, source in ((plain.vae, vae), (plain.text_encoder, one), (plain.text_encoder_2, two)):
        assert_same(model, source)


def test_a_network_alone_and_everything_else_of_the_other_pipeline(tmp_path: Path) -> None:
    """In half precision, as most are published; trained for one step from there."""
    unet = other(make("sdxl").pipe.unet).half()
    tensors = prefixed("model.diffusion_model.", published.unet(unet))
    report, teacher, plain = converted("sdxl", tensors, tmp_path, dtype=torch.float32)
    assert report.converted == ["unet"] and "text_encoder_2" in report.taken
    assert_same(teacher.load_network(torch.float32, CPU), unet.float())
    assert_same(plain.text_encoder_2, make("sdxl").pipe.text_encoder_2)
    condition = teacher.load_text(torch.float32, CPU)(["a red panda"], (16, 16))
    net = teacher.load_teacher(torch.float32, CPU)
    assert net(torch.randn(1, 4, 8, 8), torch.tensor([1.0]), condition).F.isfinite().all()


@pytest.mark.parametrize("projection", [True, False])
def test_sd3_with_three_encoders(projection: bool, tmp_path: Path) -> None:
    """T5's table is there once, and the first encoder's projection only where a tool wrote one."""
    pipe = make("sd3").pipe
    names = "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"
    net, vae, one, two, three = (other(getattr(pipe, name)) for name in names)
    first = published.clip(one)
    if not projection:
        del first["text_projection.weight"]
        one.text_projection.weight.copy_(torch.eye(16))
    shared = {key: value for key, value in three.state_dict().items() if key != "encoder.embed_tokens.weight"}
    assert "shared.weight" in shared
    tensors = prefixed("model.diffusion_model.", published.sd3(net))
    tensors |= prefixed("first_stage_model.", published.autoencoder(vae))
    tensors |= prefixed("text_encoders.clip_l.transformer.", first)
    tensors |= prefixed("text_encoders.clip_g.transformer.", published.clip(two))
    tensors |= prefixed("text_encoders.t5xxl.transformer.", shared)
    tensors |= {"text_encoders.clip_l.logit_scale": torch.ones(1)}
    report, teacher, plain = converted("sd3", tensors, tmp_path)
    assert report.converted == sorted(names) and report.left_out.keys() == {"text_encoders.clip_l.logit_scale"}
    assert_same(teacher.load_network(torch.float32, CPU), net)
    for name, source in zip(names[1:], (vae, one, two, three), strict=True):
        assert_same(getattr(plain, name), source)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", ["qwen", "pixart", "dit"])
def test_diffusers_own_names_do_for_every_class(name: str, prefix: str, tmp_path: Path) -> None:
    net = other(make(name).pipe.transformer)
    _, teacher, _ = converted(name, prefixed(prefix, net.state_dict()), tmp_path)
    assert_same(teacher.load_network(torch.float32, CPU), net)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_z_image(prefix: str, tmp_path: Path) -> None:
    net = other(make("zimage").pipe.transformer)
    _, teacher, _ = converted("zimage", prefixed(prefix, published.z_image(net)), tmp_path)
    assert_same(teacher.load_network(torch.float32, CPU), net)


def test_every_tensor_of_flux_has_a_place() -> None:
    """At full width, without memory: its conversion takes no other (and no values can be compared)."""
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=2, num_single_layers=3, guidance_embeds=True)
    given = published.flux(model)
    fill(model, from_single_file(dict(given), model, "it"), None, "it")
    del given["double_blocks.1.txt_mod.lin.bias"]
    with pytest.raises(UserError, match=r"it: .*double_blocks\.1\.txt_mod\.lin\.bias is missing"):
        from_single_file(given, model, "it")


def test_a_flux_of_another_width_is_refused(tmp_path: Path) -> None:
    net = other(make("flux").pipe.transformer)
    with pytest.raises(UserError, match=r"tuned.* its transformer: no FluxTransformer2DModel as they are published \("):
        converted("flux", published.flux(net), tmp_path)


# What does not fit


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("sd15", {"model.diffusion_model.output_blocks.3.9.weight": 1}, r"1 not in the model \(output_blocks\.3\.9\.w"),
        ("sd15", {"model.diffusion_model.other.weight": 1}, r"its unet: .* 1 not in the model \(other\.weight\)"),
        ("sd15", {"model.diffusion_model.out.2.weight": None}, r"its unet: .* 1 missing \(conv_out\.weight\)"),
        ("sd15", {"model.diffusion_model.out.2.bias": 7}, r"1 of another shape \(conv_out\.bias is \[7\] and should"),
        ("sd15", {"first_stage_model.encoder.more.weight": 1}, r"its vae: .* 1 not in the model \(encoder\.more"),
        ("sd15", {"first_stage_model.decoder.conv_in.bias": None}, r"its vae: .* 1 missing \(decoder\.conv_in\.bias"),
        (
            "sd15",
            {"cond_stage_model.transformer.text_model.final_layer_norm.bias": None},
            "its text_encoder: .* 1 miss",
        ),
        ("sd15", {"cond_stage_model.transformer.more.weight": 1}, r"its text_encoder: .* 1 not in the model \(more"),
        ("sd15", {"something.else": 1}, r"1 of its tensors are of no part that is known \(something\.else"),
        (
            "sd15",
            {"conditioner.embedders.1.model.ln_final.bias": 1},
            r"holds conditioner\.embedders\.1\.model\.\*, for",
        ),
        ("sd15", {"vae.encoder.conv_in.bias": 1}, r"holds the vae twice, the second time as vae\.\*"),
        ("sd15", {"v_pred": 1}, r"predicts v \(it holds v_pred\), and the scheduler of .* says .* = 'epsilon': take"),
        (
            "sd3",
            {"model.diffusion_model.context_embedder.weight": None},
            r"its transformer: no SD3.* published: context_embedder\.weight is m",
        ),
        (
            "sd3",
            {"model.diffusion_model.joint_blocks.0.x_block.attn.more": 1},
            r"1 not in the model \(joint_blocks\.0\.x_block\.attn\.more",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(
    name: str, change: dict[str, int | None], words: str, tmp_path: Path
) -> None:
    pipe = make(name).pipe
    if name == "sd3":
        tensors = prefixed("model.diffusion_model.", published.sd3(pipe.transformer))
        tensors |= prefixed("text_encoders.clip_g.transformer.", published.clip(pipe.text_encoder_2))
    else:
        tensors = prefixed("model.diffusion_model.", published.unet(pipe.unet))
        tensors |= prefixed("first_stage_model.", published.autoencoder(pipe.vae))
        tensors |= prefixed("cond_stage_model.transformer.", published.clip(pipe.text_encoder))
    changed = {key: None if size is None else torch.ones(size) for key, size in change.items()}
    given = {key: value.contiguous() for key, value in (tensors | changed).items() if value is not None}
    with pytest.raises(UserError, match=words):
        converted(name, given, tmp_path)
    assert not (tmp_path / "out").exists()


def test_classes_that_diffusers_converts_no_files_of(tmp_path: Path) -> None:
    words = r"diffusers converts no single file of a PixArtTransformer2DModel; it should have diffusers' own names"
    with pytest.raises(UserError, match=words):
        converted("pixart", {"blocks.0.attn.qkv.weight": torch.ones(3)}, tmp_path)


def test_a_tune_that_predicts_v_wants_a_scheduler_that_says_so(tmp_path: Path) -> None:
    unet = other(make("sd21").pipe.unet)
    tensors = prefixed("model.diffusion_model.", published.unet(unet)) | {
        "v_pred": torch.ones(0),
        "ztsnr": torch.ones(0),
    }
    report, teacher, _ = converted("sd21", tensors, tmp_path)
    assert report.left_out.keys() == {"v_pred", "ztsnr"}
    assert_same(teacher.load_network(torch.float32, CPU), unet)
