"""Tiny pipelines around transformers in which text and image attend to each other."""

from __future__ import annotations

import diffusers as d
import transformers as hf
from families.parts import Tiny, builder, clip, flow_scheduler, flux_kl, kl, language_model, t5, words
from torch import nn

_MMDIT = {"num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 16}


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
