"""Tiny models under the names by which they are published: each mapping is written the other way round, by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def sana(model: Any) -> Tensors:
    """As https://github.com/NVlabs/Sana names a SanaTransformer2DModel's tensors, with those that are no weights."""
    state: Tensors = model.state_dict()
    given: Tensors = {}

    def take(ours: str, published: str, *kinds: str) -> None:
        for kind in kinds or ("weight", "bias"):
            given[f"{published}.{kind}"] = state[f"{ours}.{kind}"]

    def fuse(ours: list[str], published: str) -> None:
        given[published] = torch.cat([state[name] for name in ours])

    take("patch_embed.proj", "x_embedder.proj")
    time = "time_embed" if model.config.guidance_embeds else "time_embed.emb"
    for layer in (1, 2):
        take(f"{time}.timestep_embedder.linear_{layer}", f"t_embedder.mlp.{2 * layer - 2}")
        take(f"caption_projection.linear_{layer}", f"y_embedder.y_proj.fc{layer}")
        if model.config.guidance_embeds:
            take(f"time_embed.guidance_embedder.linear_{layer}", f"cfg_embedder.mlp.{2 * layer - 2}")
    take("time_embed.linear", "t_block.1")
    take("caption_norm", "attention_y_norm", "weight")
    for i in range(model.config.num_layers):
        ours, block = f"transformer_blocks.{i}", f"blocks.{i}"
        given[f"{block}.scale_shift_table"] = state[f"{ours}.scale_shift_table"]
        fuse([f"{ours}.attn1.to_{x}.weight" for x in "qkv"], f"{block}.attn.qkv.weight")
        take(f"{ours}.attn1.to_out.0", f"{block}.attn.proj")
        take(f"{ours}.attn2.to_q", f"{block}.cross_attn.q_linear")
        for kind in ("weight", "bias"):
            fuse([f"{ours}.attn2.to_{x}.{kind}" for x in "kv"], f"{block}.cross_attn.kv_linear.{kind}")
        take(f"{ours}.attn2.to_out.0", f"{block}.cross_attn.proj")
        if model.config.qk_norm:
            for x in "qk":
                take(f"{ours}.attn1.norm_{x}", f"{block}.attn.{x}_norm", "weight")
                take(f"{ours}.attn2.norm_{x}", f"{block}.cross_attn.{x}_norm", "weight")
        take(f"{ours}.ff.conv_inverted", f"{block}.mlp.inverted_conv.conv")
        take(f"{ours}.ff.conv_depth", f"{block}.mlp.depth_conv.conv")
        take(f"{ours}.ff.conv_point", f"{block}.mlp.point_conv.conv", "weight")
    take("proj_out", "final_layer.linear")
    given["final_layer.scale_shift_table"] = state["scale_shift_table"]
    width = len(state["caption_norm.weight"])
    given["pos_embed"] = torch.zeros(1, 16, width)
    given["y_embedder.y_embedding"] = torch.zeros(300, model.config.caption_channels)
    return given


def _renamed(state: Tensors, ours: str, published: str, names: dict[str, str]) -> Tensors:
    """Those whose names begin with `ours`, with `names` for what follows (itself where it is not among them)."""
    found = {}
    for key, value in state.items():
        if key.startswith(f"{ours}."):
            module, _, kind = key.removeprefix(f"{ours}.").rpartition(".")
            found[".".join(part for part in (published, names.get(module, module), kind) if part)] = value
    return found


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet(model: Any) -> Tensors:
    """As https://github.com/CompVis/latent-diffusion names a UNet2DConditionModel's tensors, blocks counted through."""
    state: Tensors = model.state_dict()
    layers = model.config.layers_per_block
    given: Tensors = {}

    def put(ours: str, published: str, names: dict[str, str] | None = None) -> bool:
        found = _renamed(state, ours, published, names or {})
        given.update(found)
        return bool(found)

    for ours, published in (
        ("conv_in", "input_blocks.0.0"),
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"),
        ("add_embedding.linear_2", "label_emb.0.2"),
        ("mid_block.attentions.0", "middle_block.1"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
    ):
        put(ours, published)
    for i in (0, 1):
        put(f"mid_block.resnets.{i}", f"middle_block.{2 * i}", _RESNET)
    count = 1
    for i in range(len(model.down_blocks)):
        for j in range(layers):
            put(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{count}.0", _RESNET)
            put(f"down_blocks.{i}.attentions.{j}", f"input_blocks.{count}.1")
            count += 1
        count += put(f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{count}.0.op")
    count = 0
    for i in range(len(model.up_blocks)):
        for j in range(layers + 1):
            put(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{count}.0", _RESNET)
            attends = put(f"up_blocks.{i}.attentions.{j}", f"output_blocks.{count}.1")
            if j == layers:
                put(f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{count}.{2 if attends else 1}.conv")
            count += 1
    return given


def autoencoder(model: Any) -> Tensors:
    """As CompVis names an AutoencoderKL's tensors: the decoder's blocks from the last to the first, and attention as
    convolutions."""
    state: Tensors = model.state_dict()
    given = {key: value for key, value in state.items() if "quant_conv" in key}
    for half, blocks, published in (("encoder", "down_blocks", "down"), ("decoder", "up_blocks", "up")):
        count = len(getattr(model, half).__getattr__(blocks))
        for i in range(count):
            place = f"{half}.{published}.{i if half == 'encoder' else count - 1 - i}"
            for j in range(model.config.layers_per_block + (half == "decoder")):
                given |= _renamed(
                    state, f"{half}.{blocks}.{i}.resnets.{j}", f"{place}.block.{j}", {"conv_shortcut": "nin_shortcut"}
                )
            given |= _renamed(
                state, f"{half}.{blocks}.{i}.{published}samplers.0.conv", f"{place}.{published}sample.conv", {}
            )
        for name, theirs in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
            given |= _renamed(state, f"{half}.{name}", f"{half}.{theirs}", {})
        for i in (0, 1):
            given |= _renamed(state, f"{half}.mid_block.resnets.{i}", f"{half}.mid.block_{i + 1}", {})
        names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
        attention = _renamed(state, f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", names)
        given |= {key: value[..., None, None] if value.dim() == 2 else value for key, value in attention.items()}
    return given


def clip(model: Any) -> Tensors:
    """As transformers has always named them in files: with `text_model.` in front of all but the projection."""
    state: Tensors = model.state_dict()
    inner = {key.removeprefix("text_model."): value for key, value in state.items()}
    return {key if key.startswith("text_projection") else f"text_model.{key}": value for key, value in inner.items()}


def open_clip(model: Any) -> Tensors:
    """As https://github.com/mlfoundations/open_clip names them."""
    state = {key.removeprefix("text_model."): value for key, value in clip(model).items()}
    given = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "logit_scale": torch.tensor(1.0),
    }
    if "text_projection.weight" in state:
        given["text_projection"] = state["text_projection.weight"].T.contiguous()
    given |= _renamed(state, "final_layer_norm", "ln_final", {})
    names = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    for i in range(model.config.num_hidden_layers):
        ours, block = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        layer = _renamed(state, ours, block, names)
        given |= {key: value for key, value in layer.items() if "self_attn" not in key}
        for kind in ("weight", "bias"):
            fused = [state[f"{ours}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            given[f"{block}.attn.in_proj_{kind}"] = torch.cat(fused)
    return given


def _scale_and_shift(value: Tensor) -> Tensor:
    """diffusers has the scale first, those who publish the shift."""
    return torch.cat(value.chunk(2)[::-1])


def sd3(model: Any) -> Tensors:
    """As Stability AI (https://github.com/Stability-AI/sd3-ref) names an SD3Transformer2DModel's tensors."""
    state: Tensors = model.state_dict()
    given = {"pos_embed": state["pos_embed.pos_embed"]}
    for ours, published in (
        ("pos_embed.proj", "x_embedder.proj"),
        ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
        ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
        ("context_embedder", "context_embedder"),
        ("proj_out", "final_layer.linear"),
    ):
        given |= _renamed(state, ours, published, {})
    last = _renamed(state, "norm_out.linear", "final_layer.adaLN_modulation.1", {})
    given |= {key: _scale_and_shift(value) for key, value in last.items()}
    for i in range(model.config.num_layers):
        ours = f"transformer_blocks.{i}"
        for stream, qkv, norms, out, modulation, mlp in (
            ("x_block", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "norm1", "ff"),
            (
                "context_block",
                ("add_q_proj", "add_k_proj", "add_v_proj"),
                ("norm_added_q", "norm_added_k"),
                "to_add_out",
                "norm1_context",
                "ff_context",
            ),
        ):
            block = f"joint_blocks.{i}.{stream}"
            for kind in ("weight", "bias"):
                given[f"{block}.attn.qkv.{kind}"] = torch.cat([state[f"{ours}.attn.{x}.{kind}"] for x in qkv])
            for name, theirs in zip(norms, ("ln_q", "ln_k"), strict=True):
                given |= _renamed(state, f"{ours}.attn.{name}", f"{block}.attn.{theirs}", {})
            given |= _renamed(state, f"{ours}.attn.{out}", f"{block}.attn.proj", {})
            given |= _renamed(state, f"{ours}.{mlp}", f"{block}.mlp", {"net.0.proj": "fc1", "net.2": "fc2"})
            norm = _renamed(state, f"{ours}.{modulation}.linear", f"{block}.adaLN_modulation.1", {})
            ends = stream == "context_block" and i == model.config.num_layers - 1
            given |= {key: _scale_and_shift(value) if ends else value for key, value in norm.items()}
    return given


def flux(model: Any) -> Tensors:
    """As Black Forest Labs (https://github.com/black-forest-labs/flux) names a FluxTransformer2DModel's tensors."""
    state: Tensors = model.state_dict()
    given: Tensors = {}
    embed, layers = "time_text_embed", {"linear_1": "in_layer", "linear_2": "out_layer"}
    for ours, published, names in (
        ("x_embedder", "img_in", {}),
        ("context_embedder", "txt_in", {}),
        (f"{embed}.timestep_embedder", "time_in", layers),
        (f"{embed}.text_embedder", "vector_in", layers),
        (f"{embed}.guidance_embedder", "guidance_in", layers),
        ("proj_out", "final_layer.linear", {}),
    ):
        given |= _renamed(state, ours, published, names)
    last = _renamed(state, "norm_out.linear", "final_layer.adaLN_modulation.1", {})
    given |= {key: _scale_and_shift(value) for key, value in last.items()}

    def fuse(ours: list[str], published: str) -> None:
        for kind in ("weight", "bias"):
            given[f"{published}.{kind}"] = torch.cat([state[f"{name}.{kind}"] for name in ours])

    for i in range(model.config.num_layers):
        ours, block = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for stream, qkv, norms, out, modulation, mlp in (
            ("img", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "norm1", "ff"),
            (
                "txt",
                ("add_q_proj", "add_k_proj", "add_v_proj"),
                ("norm_added_q", "norm_added_k"),
                "to_add_out",
                "norm1_context",
                "ff_context",
            ),
        ):
            fuse([f"{ours}.attn.{name}" for name in qkv], f"{block}.{stream}_attn.qkv")
            for norm, name in zip(norms, ("query", "key"), strict=True):
                given[f"{block}.{stream}_attn.norm.{name}_norm.scale"] = state[f"{ours}.attn.{norm}.weight"]
            given |= _renamed(state, f"{ours}.attn.{out}", f"{block}.{stream}_attn.proj", {})
            given |= _renamed(state, f"{ours}.{modulation}.linear", f"{block}.{stream}_mod.lin", {})
            given |= _renamed(state, f"{ours}.{mlp}", f"{block}.{stream}_mlp", {"net.0.proj": "0", "net.2": "2"})
    for i in range(model.config.num_single_layers):
        ours, block = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        fuse([*(f"{ours}.attn.to_{x}" for x in "qkv"), f"{ours}.proj_mlp"], f"{block}.linear1")
        for norm, name in (("norm_q", "query"), ("norm_k", "key")):
            given[f"{block}.norm.{name}_norm.scale"] = state[f"{ours}.attn.{norm}.weight"]
        given |= _renamed(state, f"{ours}.proj_out", f"{block}.linear2", {})
        given |= _renamed(state, f"{ours}.norm.linear", f"{block}.modulation.lin", {})
    return given


def z_image(model: Any) -> Tensors:
    """As https://github.com/Tongyi-MAI/Z-Image names a ZImageTransformer2DModel's tensors."""
    given: Tensors = {"norm_final.weight": torch.ones(2)}  # which nothing uses
    state: Tensors = model.state_dict()
    for key, value in state.items():
        if ".attention.to_q." in key:
            fused = [state[key.replace("to_q", f"to_{x}")] for x in "qkv"]
            given[key.replace("to_q", "qkv")] = torch.cat(fused)
        elif ".attention.to_k." not in key and ".attention.to_v." not in key:
            name = key.replace("all_final_layer.2-1.", "final_layer.").replace("all_x_embedder.2-1.", "x_embedder.")
            name = name.replace("attention.to_out.0", "attention.out")
            given[name.replace("norm_q", "q_norm").replace("norm_k", "k_norm")] = value
    return given
