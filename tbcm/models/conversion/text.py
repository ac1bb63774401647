"""Text encoders as single files hold them, in transformers' names: its own, or open_clip's.

The names are facts of https://github.com/mlfoundations/open_clip (src/open_clip/transformer.py) and of diffusers'
loaders/single_file_utils.py. `from_single_file` of diffusers' pipelines is not used for them: it says nothing of
tensors that are missing or that the model has no place for.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from tbcm.models.conversion.renaming import Converted, Ignored, Rules, Tensors, renamed, without

_IGNORED: Ignored = (
    (r".*position_ids", "they are counted"),
    (r"logit_scale", "of its contrastive training"),
)
_LAYER, _OURS = r"transformer\.resblocks\.(\d+)\.", r"text_model.encoder.layers.\1."
_OPEN_CLIP: Rules = (
    (r"token_embedding", "text_model.embeddings.token_embedding"),
    (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"ln_final", "text_model.final_layer_norm"),
    (r"text_projection", "text_projection.weight"),
    (_LAYER + r"ln_([12])", _OURS + r"layer_norm\2"),
    (_LAYER + r"attn\.in_proj_(weight|bias)", tuple(_OURS + rf"self_attn.{part}_proj.\2" for part in "qkv")),
    (_LAYER + r"attn\.out_proj", _OURS + "self_attn.out_proj"),
    (_LAYER + r"mlp\.c_fc", _OURS + "mlp.fc1"),
    (_LAYER + r"mlp\.c_proj", _OURS + "mlp.fc2"),
)


def from_open_clip(state: Tensors, model: Any) -> Converted:
    """The tensors of a CLIPTextModel(WithProjection); Stable Diffusion 2 does not run the last layer of its files."""
    state = dict(state)
    if "text_projection" in state:
        state["text_projection"] = state["text_projection"].mT.contiguous()  # a matrix there, a layer here
    last = rf"transformer\.resblocks\.{model.config.num_hidden_layers}\..*"
    ignored = (*_IGNORED, (last, "a last layer, which this pipeline does not run"))
    return _clip(renamed(state, _OPEN_CLIP, ignored), model)


def from_clip(state: Tensors, model: Any) -> Converted:
    """The tensors of a CLIPTextModel(WithProjection)."""
    return _clip(Converted(*without(state, _IGNORED)), model)


def from_first_clip(state: Tensors, model: Any) -> Converted:
    """As `from_clip`, of SD3's first encoder: where its files have no projection, diffusers takes one that changes
    nothing, and so does this."""
    projection = model.state_dict().get("text_projection.weight")
    unchanged = {} if projection is None else {"text_projection.weight": torch.eye(*projection.shape)}
    return from_clip(unchanged | state, model)


def from_t5(state: Tensors, model: Any) -> Converted:
    """The tensors of a T5EncoderModel."""
    return Converted(*without(state, _IGNORED))


def _clip(converted: Converted, model: Any) -> Converted:
    """For this version's names, with or without a `text_model.` in front, and without a projection where there is no
    place for one."""
    own = model.state_dict()
    nested = any(name.startswith("text_model.") for name in own)
    tensors = {name if nested else re.sub(r"^text_model\.", "", name): x for name, x in converted.tensors.items()}
    left_out = dict(converted.left_out)
    if "text_projection.weight" in tensors and "text_projection.weight" not in own:
        del tensors["text_projection.weight"]
        left_out["text_projection"] = "this pipeline does not project"
    return Converted(tensors, left_out, converted.unknown)
