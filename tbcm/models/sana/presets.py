"""Architectures by name, for dry runs and benchmarks without weights (random weights cost and weigh the same)."""

from __future__ import annotations

from typing import Any

_SANA = {
    "in_channels": 32,
    "out_channels": 32,
    "attention_head_dim": 32,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "patch_size": 1,
    "sample_size": 32,
    "qk_norm": "rms_norm_across_heads",
    "timestep_scale": 0.001,  # dense time: the network sees s in [0, 1], diffusers' schedulers count to 1,000
}

SANA: dict[str, dict[str, Any]] = {
    "sana-600m": _SANA
    | {
        "num_layers": 28,
        "num_attention_heads": 36,
        "num_cross_attention_heads": 16,
        "cross_attention_head_dim": 72,
        "cross_attention_dim": 1152,
    },
    "sana-1600m": _SANA
    | {
        "num_layers": 20,
        "num_attention_heads": 70,
        "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112,
        "cross_attention_dim": 2240,
    },
    "icons": _SANA
    | {
        "in_channels": 8,
        "out_channels": 8,
        "num_layers": 5,
        "num_attention_heads": 8,
        "num_cross_attention_heads": 4,
        "cross_attention_head_dim": 64,
        "cross_attention_dim": 256,
        "caption_channels": 384,
        "patch_size": 2,
        "sample_size": 8,
        "interpolation_scale": 1.0,
    },
    "tiny": _SANA
    | {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 384,
        "sample_size": 8,
    },
}
"""Arguments of diffusers' SanaTransformer2DModel, without a guidance embedding."""

GEMMA_2_2B: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
"""Arguments of transformers' Gemma2Config for Sana's text encoder."""

MINILM: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
"""Arguments of transformers' BertConfig for the icons teacher's text encoder."""

_DC_AE_F32C32: dict[str, Any] = {
    "latent_channels": 32,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
_ICONS_AE: dict[str, Any] = {
    "latent_channels": 8,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": [32, 32, 64, 128],
    "decoder_block_out_channels": [32, 32, 64, 128],
    "encoder_layers_per_block": [0, 1, 1, 1],
    "decoder_layers_per_block": [0, 1, 1, 2],
    "encoder_qkv_multiscales": [[], [], [], []],
    "decoder_qkv_multiscales": [[], [], [], []],
    "encoder_out_shortcut": False,
    "decoder_in_shortcut": False,
    "scaling_factor": 1.0,
}
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "sana-600m": _DC_AE_F32C32,
    "sana-1600m": _DC_AE_F32C32,
    "icons": _ICONS_AE,
    "tiny": _ICONS_AE | {"latent_channels": 4},
}
"""Arguments of diffusers' AutoencoderDC that goes with each of them."""


def sana(name: str) -> dict[str, Any]:
    """A pipeline of one of them, with what `tbcm.models.families.presets` says of others."""
    return {
        "_class_name": "SanaPipeline",
        "transformer": ("SanaTransformer2DModel", SANA[name]),
        "vae": ("AutoencoderDC", AUTOENCODERS[name]),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    }
