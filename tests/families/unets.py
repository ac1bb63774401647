"""Tiny pipelines around U-Nets."""

from __future__ import annotations

from typing import Any

import diffusers as d
from families.parts import BETAS, Tiny, builder, chatglm, chatglm_words, clip, kl, words

_UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 16,
    "norm_num_groups": 2,
}


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


def _with_sizes(pooled: int, **options: Any) -> Any:
    """SDXL's network, which is told sizes and a pooled text of so many channels."""
    return d.UNet2DConditionModel(
        **_UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + pooled,
        **options,
    )


def _sdxl(scheduler: Any, **vae: Any) -> Tiny:
    return Tiny(
        d.StableDiffusionXLPipeline(
            vae=kl(**vae),
            text_encoder=clip(True, 8),
            text_encoder_2=clip(True, 8),
            tokenizer=words(),
            tokenizer_2=words(),
            unet=_with_sizes(8),
            scheduler=scheduler,
            add_watermarker=False,
        )
    )


@builder
def sdxl() -> Tiny:
    return _sdxl(_leading())


@builder
def edm() -> Tiny:
    """SDXL's network under EDM's preconditioning (Playground v2.5)."""
    return _sdxl(d.EDMEulerScheduler(), latents_mean=[0.1] * 4, latents_std=[2.0] * 4, scaling_factor=0.5)


@builder
def kolors() -> Tiny:
    """SDXL's network with a projection of ChatGLM's states."""
    pipe = d.KolorsPipeline(
        vae=kl(),
        text_encoder=chatglm(),
        tokenizer=chatglm_words(),
        unet=_with_sizes(16, encoder_hid_dim=16, encoder_hid_dim_type="text_proj"),
        scheduler=_leading(),
    )
    return Tiny(pipe)


def _leading() -> Any:
    return d.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)


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
