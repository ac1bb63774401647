"""Whole pipelines of the real diffusers classes with tiny random networks, for tests and for a first try.

python tests/families/tiny.py sdxl OUT       # writes a folder as save_pretrained does
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import diffusers as d
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

WORDS = ["a", "red", "panda", "on", "the", "moon", "blue", "cat", "with", "hat", "in", "rain", "house", "dog"]
PROMPTS = ["a red panda", "blue cat on the moon"]


@dataclass(frozen=True)
class Tiny:
    """A pipeline, the prompts that it takes, its image size, and what else its call needs for that size."""

    pipe: Any
    size: dict[str, Any] = field(default_factory=lambda: {"height": 16, "width": 16})
    prompts: tuple[str, ...] = tuple(PROMPTS)


BUILDERS: dict[str, Callable[[], Tiny]] = {}


def builder(build: Callable[[], Tiny]) -> Callable[[], Tiny]:
    BUILDERS[build.__name__] = build
    return build


def make(name: str, dtype: torch.dtype = torch.float32) -> Tiny:
    """The tiny pipeline `name`, with a scheduler of its own and the networks of every call, no weight of which is zero
    or may be changed."""
    tiny = _made(name, dtype)
    pipe = copy.copy(tiny.pipe)
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    return replace(tiny, pipe=pipe)


@cache
def _made(name: str, dtype: torch.dtype) -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny = BUILDERS[name]()
        for part in tiny.pipe.components.values():
            if isinstance(part, nn.Module):
                for parameter in part.parameters():  # nothing may stay at a zero initialisation
                    if parameter.abs().max() == 0:
                        nn.init.normal_(parameter, std=0.05)
                part.to(dtype).eval().requires_grad_(False)
    tiny.pipe.set_progress_bar_config(disable=True)
    return tiny


# Parts


def words(length: int = 16, *, ends: bool = True, chat: bool = False) -> Any:
    vocabulary = {"<bos>": 0, "<pad>": 1, "<eos>": 2, "<unk>": 3} | {w: i + 4 for i, w in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "<bos> $A <eos>" if ends else "$A"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", 0), ("<eos>", 2)]
    )
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=length,
        padding_side="right",
    )
    if chat:
        fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return fast


def clip(projected: bool = True, width: int = 16) -> Any:
    config = hf.CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        hidden_size=width,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=3,
        vocab_size=64,
        projection_dim=width,
        max_position_embeddings=16,
        hidden_act="gelu",
    )
    return (hf.CLIPTextModelWithProjection if projected else hf.CLIPTextModel)(config)


def t5(width: int = 16, many: bool = False) -> Any:
    config, model = (hf.UMT5Config, hf.UMT5EncoderModel) if many else (hf.T5Config, hf.T5EncoderModel)
    sizes = {"vocab_size": 64, "d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    return model(config(**sizes, pad_token_id=1, eos_token_id=2))


def language_model(model: Any, config: Any) -> Any:
    return model(
        config(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
        )
    )


def kl(channels: int = 4, halvings: int = 1, **options: Any) -> Any:
    """Latents of half the image's side, or halved again."""
    return d.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8,) * (halvings + 1),
        down_block_types=["DownEncoderBlock2D"] * (halvings + 1),
        up_block_types=["UpDecoderBlock2D"] * (halvings + 1),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=32,
        **options,
    )


def flux_kl(halvings: int = 1) -> Any:
    return kl(halvings=halvings, shift_factor=0.1159, scaling_factor=0.3611)


def flow_scheduler(**options: Any) -> Any:
    return d.FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | options))


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

_UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 16,
    "norm_num_groups": 2,
}
_MMDIT = {"num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 16}


# Pipelines


def _sd15(prediction: str) -> Tiny:
    unet = d.UNet2DConditionModel(
        **_UNET,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    )
    scheduler = d.DDIMScheduler(
        **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction
    )
    return Tiny(
        d.StableDiffusionPipeline(
            vae=kl(),
            text_encoder=clip(False),
            tokenizer=words(),
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


@builder
def sd15() -> Tiny:
    return _sd15("epsilon")


@builder
def sd21() -> Tiny:
    """Predicts v."""
    return _sd15("v_prediction")


def _sdxl(scheduler: Any, **vae: Any) -> Tiny:
    unet = d.UNet2DConditionModel(
        **_UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 8,
    )
    return Tiny(
        d.StableDiffusionXLPipeline(
            vae=kl(**vae),
            text_encoder=clip(True, 8),
            text_encoder_2=clip(True, 8),
            tokenizer=words(),
            tokenizer_2=words(),
            unet=unet,
            scheduler=scheduler,
            add_watermarker=False,
        )
    )


@builder
def sdxl() -> Tiny:
    return _sdxl(d.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1))


@builder
def edm() -> Tiny:
    """SDXL's network under EDM's preconditioning (Playground v2.5)."""
    return _sdxl(d.EDMEulerScheduler(), latents_mean=[0.1] * 4, latents_std=[2.0] * 4, scaling_factor=0.5)


@builder
def sd3() -> Tiny:
    net = d.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        qk_norm="rms_norm",
    )
    return Tiny(
        d.StableDiffusion3Pipeline(
            transformer=net,
            scheduler=flow_scheduler(),
            vae=kl(shift_factor=0.0609, scaling_factor=1.5305),
            text_encoder=clip(),
            tokenizer=words(),
            text_encoder_2=clip(),
            tokenizer_2=words(),
            text_encoder_3=t5(32),
            tokenizer_3=words(),
        )
    )


def _flux(guidance: bool) -> Tiny:
    net = d.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        axes_dims_rope=[4, 4, 8],
        **_MMDIT,
    )
    return Tiny(
        d.FluxPipeline(
            transformer=net,
            scheduler=flow_scheduler(use_dynamic_shifting=True),
            vae=flux_kl(),
            text_encoder=clip(False),
            tokenizer=words(),
            text_encoder_2=t5(),
            tokenizer_2=words(),
        )
    )


@builder
def flux() -> Tiny:
    return _flux(guidance=True)


@builder
def schnell() -> Tiny:
    """FLUX without a guidance embedding."""
    return _flux(guidance=False)


@builder
def chroma() -> Tiny:
    net = d.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        axes_dims_rope=[4, 4, 8],
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
        **_MMDIT,
    )
    return Tiny(
        d.ChromaPipeline(
            transformer=net, scheduler=flow_scheduler(), vae=flux_kl(), text_encoder=t5(), tokenizer=words()
        )
    )


@builder
def qwen() -> Tiny:
    net = d.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    vae = d.AutoencoderKLQwenImage(
        base_dim=6,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1] * 4,
        latents_std=[2.0] * 4,
    )
    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6}
    config = hf.Qwen2_5_VLConfig(
        text_config=text | {"num_attention_heads": 2, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        vision_end_token_id=40,
        vision_start_token_id=41,
        vision_token_id=42,
        image_token_id=43,
        video_token_id=44,
    )
    pipe = d.QwenImagePipeline(
        transformer=net,
        scheduler=flow_scheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02),
        vae=vae,
        text_encoder=hf.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=words(1024, ends=False),
    )
    # The template is written for the real tokenizer, and cut off again after so many of its tokens.
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "a red {} cat", 2
    return Tiny(pipe)


@builder
def lumina2() -> Tiny:
    net = d.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=[4, 2, 2],
        cap_feat_dim=16,
    )
    encoder = language_model(hf.Gemma2Model, hf.Gemma2Config)
    return Tiny(
        d.Lumina2Pipeline(
            transformer=net,
            scheduler=flow_scheduler(shift=6.0),
            vae=flux_kl(3),  # its pipeline counts with no other
            text_encoder=encoder,
            tokenizer=words(256),
        ),
        {"height": 64, "width": 64},
    )


@builder
def auraflow() -> Tiny:
    net = d.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )
    return Tiny(
        d.AuraFlowPipeline(
            transformer=net,
            scheduler=flow_scheduler(shift=1.73),
            vae=kl(),
            text_encoder=t5(many=True),
            tokenizer=words(256),
        )
    )


@builder
def zimage() -> Tiny:
    net = d.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    for token in (net.x_pad_token, net.cap_pad_token):
        nn.init.normal_(token, std=0.02)
    return Tiny(
        d.ZImagePipeline(
            transformer=net,
            scheduler=flow_scheduler(),
            vae=flux_kl(),
            text_encoder=language_model(hf.Qwen3Model, hf.Qwen3Config),
            tokenizer=words(512, ends=False, chat=True),
        ),
        {"height": 32, "width": 32},
    )


@builder
def cogview4() -> Tiny:
    net = d.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
    )
    shifts = {"base_shift": 0.25, "max_shift": 0.75, "base_image_seq_len": 256}
    return Tiny(
        d.CogView4Pipeline(
            transformer=net,
            scheduler=flow_scheduler(**shifts, use_dynamic_shifting=True, time_shift_type="linear"),
            vae=kl(),
            text_encoder=language_model(hf.GlmModel, hf.GlmConfig),
            tokenizer=words(1024),
        )
    )


@builder
def pixart() -> Tiny:
    net = d.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=False,
    )
    return Tiny(
        d.PixArtSigmaPipeline(
            transformer=net,
            scheduler=d.DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False),
            vae=kl(),
            text_encoder=t5(),
            tokenizer=words(300),
        ),
        {"height": 16, "width": 16, "use_resolution_binning": False},
    )


@builder
def sana() -> Tiny:
    net = d.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
        patch_size=1,
        mlp_ratio=2.5,
        qk_norm="rms_norm_across_heads",
        timestep_scale=0.001,
    )
    vae = d.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 2,
        decoder_block_types=("ResBlock",) * 2,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.41407,
    )
    return Tiny(
        d.SanaPipeline(
            transformer=net,
            scheduler=flow_scheduler(),
            vae=vae,
            text_encoder=language_model(hf.Gemma2Model, hf.Gemma2Config),
            tokenizer=words(300),
        ),
        {"height": 32, "width": 32, "use_resolution_binning": False},
    )


@builder
def wan() -> Tiny:
    net = d.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=64,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    vae = d.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1] * 4,
        latents_std=[2.0] * 4,
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )
    return Tiny(
        d.WanPipeline(
            transformer=net, scheduler=flow_scheduler(), vae=vae, text_encoder=t5(many=True), tokenizer=words(512)
        ),
        {"height": 16, "width": 16, "num_frames": 3},
    )


@builder
def flux2() -> Tiny:
    net = d.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=48,
        timestep_guidance_channels=64,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=False,
    )
    vae = d.AutoencoderKLFlux2(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return Tiny(
        d.Flux2KleinPipeline(
            transformer=net,
            scheduler=flow_scheduler(use_dynamic_shifting=True),
            vae=vae,
            text_encoder=language_model(hf.Qwen3ForCausalLM, hf.Qwen3Config),
            tokenizer=words(512, ends=False, chat=True),
        ),
        {"height": 16, "width": 16, "text_encoder_out_layers": (1, 2, 3)},
    )


@builder
def dit() -> Tiny:
    net = d.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    return Tiny(d.DiTPipeline(transformer=net, vae=kl(), scheduler=d.DDIMScheduler(clip_sample=False)), {}, ("3", "5"))


@builder
def ddpm() -> Tiny:
    net = d.UNet2DModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=8,
        in_channels=3,
        out_channels=3,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return Tiny(d.DDPMPipeline(unet=net, scheduler=d.DDIMScheduler(clip_sample=False)), {}, ("", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a tiny random pipeline, to try the package with.")
    parser.add_argument("family", choices=sorted(BUILDERS))
    parser.add_argument("out", help="the folder to write")
    arguments = parser.parse_args()
    make(arguments.family).pipe.save_pretrained(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
