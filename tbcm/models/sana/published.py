"""Sana's weights as NVlabs publishes them, in diffusers' names.

The names and the order within fused matrices are facts of https://github.com/NVlabs/Sana (diffusion/model/nets) and of
diffusers' scripts/convert_sana_to_diffusers.py. What stands in no file, the scale of time among it, is the
configuration's to say.
"""

from __future__ import annotations

from tbcm.models.conversion.renaming import Converted, Ignored, Rules, Tensors, renamed

_BLOCK, _OURS = r"blocks\.(\d+)\.", r"transformer_blocks.\1."
_RULES: Rules = (
    (r"x_embedder\.proj", "patch_embed.proj"),
    (r"y_embedder\.y_proj\.fc([12])", r"caption_projection.linear_\1"),
    (r"attention_y_norm", "caption_norm"),
    (r"t_block\.1", "time_embed.linear"),
    (r"final_layer\.linear", "proj_out"),
    (r"final_layer\.scale_shift_table", "scale_shift_table"),
    (_BLOCK + "scale_shift_table", _OURS + "scale_shift_table"),
    (_BLOCK + r"attn\.qkv", tuple(_OURS + f"attn1.to_{part}" for part in "qkv")),
    (_BLOCK + r"attn\.([qk])_norm", _OURS + r"attn1.norm_\2"),
    (_BLOCK + r"attn\.proj", _OURS + "attn1.to_out.0"),
    (_BLOCK + r"cross_attn\.q_linear", _OURS + "attn2.to_q"),
    (_BLOCK + r"cross_attn\.kv_linear", tuple(_OURS + f"attn2.to_{part}" for part in "kv")),
    (_BLOCK + r"cross_attn\.([qk])_norm", _OURS + r"attn2.norm_\2"),
    (_BLOCK + r"cross_attn\.proj", _OURS + "attn2.to_out.0"),
    (_BLOCK + r"mlp\.inverted_conv\.conv", _OURS + "ff.conv_inverted"),
    (_BLOCK + r"mlp\.depth_conv\.conv", _OURS + "ff.conv_depth"),
    (_BLOCK + r"mlp\.point_conv\.conv", _OURS + "ff.conv_point"),
)
_IGNORED: Ignored = (
    (r"(base_model\.|model\.)?pos_embed", "positions are computed"),
    (r"y_embedder\.y_embedding", "diffusers' pipelines encode an empty prompt instead"),
    (r"logvar_linear\.(weight|bias)", "the log-variance of its training"),
)


def from_published(state: Tensors, *, guidance_embeds: bool) -> Converted:
    """The tensors of a SanaTransformer2DModel. Beside an embedding of guidance (Sana-Sprint) diffusers keeps the time's
    under another name."""
    time = "time_embed." if guidance_embeds else "time_embed.emb."
    embedders: Rules = tuple(
        (rf"{published}\.mlp\.{layer}", f"{ours}.linear_{number}")
        for published, ours in (
            ("t_embedder", f"{time}timestep_embedder"),
            ("cfg_embedder", "time_embed.guidance_embedder"),
        )
        for layer, number in ((0, 1), (2, 2))
    )
    return renamed(state, (*_RULES, *embedders), _IGNORED)
