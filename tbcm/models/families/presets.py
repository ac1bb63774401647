"""Published pipelines by name, as their configuration files have them: for dry runs without those files.

Facts of model_index.json and of each component's config.json (what is a class's default is left out) at

    sd15          stable-diffusion-v1-5/stable-diffusion-v1-5
    sdxl          stabilityai/stable-diffusion-xl-base-1.0
    sd35-medium   stabilityai/stable-diffusion-3.5-medium
    flux-dev      black-forest-labs/FLUX.1-dev
    pixart-sigma  PixArt-alpha/PixArt-Sigma-XL-2-1024-MS

A preset has the class of the pipeline as `_class_name` and of each component its class and configuration; of a
tokenizer only how many tokens it makes of a text at most.
"""

from __future__ import annotations

from typing import Any

Preset = dict[str, Any]


def _kl(channels: int, scaling: float, **options: Any) -> tuple[str, Preset]:
    """The autoencoder of latents of an eighth of the image's side."""
    return "AutoencoderKL", {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": channels,
        "scaling_factor": scaling,
        **options,
    }


_CLIP_L: Preset = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
_CLIP_G = _CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_T5_XXL: Preset = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}

_SD15: Preset = {
    "_class_name": "StableDiffusionPipeline",
    "unet": (
        "UNet2DConditionModel",
        {"block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8, "cross_attention_dim": 768}
        | {"sample_size": 64},
    ),
    "scheduler": ("PNDMScheduler", _BETAS | {"skip_prk_steps": True}),
    "vae": _kl(4, 0.18215, sample_size=512),
    "text_encoder": ("CLIPTextModel", _CLIP_L),
    "tokenizer": 77,
}
_SDXL: Preset = {
    "_class_name": "StableDiffusionXLPipeline",
    "unet": (
        "UNet2DConditionModel",
        {
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
        },
    ),
    "scheduler": ("EulerDiscreteScheduler", _BETAS | {"timestep_spacing": "leading"}),
    "vae": _kl(4, 0.13025, sample_size=1024),
    "text_encoder": ("CLIPTextModel", _CLIP_L),
    "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_G),
    "tokenizer": 77,
    "tokenizer_2": 77,
}
_SD35_MEDIUM: Preset = {
    "_class_name": "StableDiffusion3Pipeline",
    "transformer": (
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "dual_attention_layers": [*range(13)],
            "qk_norm": "rms_norm",
            "pos_embed_max_size": 384,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "sample_size": 128,
        },
    ),
    "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "vae": _kl(16, 1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False, sample_size=1024),
    "text_encoder": ("CLIPTextModelWithProjection", _CLIP_L),
    "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_G),
    "text_encoder_3": ("T5EncoderModel", _T5_XXL),
    "tokenizer": 77,
    "tokenizer_2": 77,
    "tokenizer_3": 512,
}
_FLUX_DEV: Preset = {
    "_class_name": "FluxPipeline",
    "transformer": (
        "FluxTransformer2DModel",
        {
            "num_layers": 19,
            "num_single_layers": 38,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": [16, 56, 56],
            "patch_size": 1,
            "in_channels": 64,
        },
    ),
    "scheduler": (
        "FlowMatchEulerDiscreteScheduler",
        {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
    ),
    "vae": _kl(16, 0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False, sample_size=1024),
    "text_encoder": ("CLIPTextModel", _CLIP_L),
    "text_encoder_2": ("T5EncoderModel", _T5_XXL),
    "tokenizer": 77,
    "tokenizer_2": 512,
}
_PIXART_SIGMA: Preset = {
    "_class_name": "PixArtSigmaPipeline",
    "transformer": (
        "PixArtTransformer2DModel",
        {
            "num_layers": 28,
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "cross_attention_dim": 1152,
            "caption_channels": 4096,
            "use_additional_conditions": False,
            "interpolation_scale": 2,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 8,
            "sample_size": 128,
        },
    ),
    "scheduler": (
        "DPMSolverMultistepScheduler",
        {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
    ),
    "vae": _kl(4, 0.13025, sample_size=512),
    "text_encoder": ("T5EncoderModel", _T5_XXL),
    "tokenizer": 300,
}

PRESETS: dict[str, Preset] = {
    "sd15": _SD15,
    "sdxl": _SDXL,
    "sd35-medium": _SD35_MEDIUM,
    "flux-dev": _FLUX_DEV,
    "pixart-sigma": _PIXART_SIGMA,
}
