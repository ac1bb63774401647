"""Tiny pipelines around transformers whose image looks at the text, or which are told a class."""

from __future__ import annotations

from typing import Any

import diffusers as d
import transformers as hf
from families.parts import Tiny, builder, flow_scheduler, kl, language_model, t5, words


def _pixart(pipeline: Any, tokens: int, sample_size: int) -> Tiny:
    net = d.PixArtTransformer2DModel(
        sample_size=sample_size,
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
        use_additional_conditions=sample_size == 128,
    )
    return Tiny(
        pipeline(
            transformer=net,
            scheduler=d.DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False),
            vae=kl(),
            text_encoder=t5(),
            tokenizer=words(tokens),
        ),
        {"height": 16, "width": 16, "use_resolution_binning": False},
    )


@builder
def pixart() -> Tiny:
    return _pixart(d.PixArtSigmaPipeline, tokens=300, sample_size=8)


@builder
def pixart_alpha() -> Tiny:
    """Its network for 1,024 pixels, which is told the size and the aspect ratio: its pipeline knows it by the 128."""
    return _pixart(d.PixArtAlphaPipeline, tokens=120, sample_size=128)


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
