"""What of a model's configuration this package implements: everything else is refused, by key, when it is read."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

from tbcm.errors import UserError

logger = logging.getLogger(__name__)

Flag = Annotated[bool, Strict()]
Count = Annotated[int, Strict(), Field(ge=1, le=2**16)]
Positive = Annotated[float, Strict(), Field(gt=0, le=1e6)]
Widths = Annotated[list[Count], Field(min_length=2, max_length=12)]
Layers = Annotated[list[Annotated[int, Strict(), Field(ge=0, le=256)]], Field(min_length=2, max_length=12)]
Scales = Annotated[list[Annotated[list[Count], Field(max_length=8)]], Field(min_length=2, max_length=12)]


class Facts(BaseModel):
    """Keys and the values that are supported. Upper bounds are far above every published model: they stop a damaged
    file from being built."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class SanaTransformer(Facts):
    """`tbcm.models.sana.network` and `sana_block`, which write diffusers' forward pass out."""

    in_channels: Count
    out_channels: Count | None
    num_attention_heads: Count
    attention_head_dim: Count
    num_layers: Annotated[int, Strict(), Field(ge=1, le=256)]
    num_cross_attention_heads: Count
    cross_attention_head_dim: Count
    cross_attention_dim: Count
    caption_channels: Count
    mlp_ratio: Annotated[float, Strict(), Field(gt=0, le=64)]
    dropout: Literal[0]
    attention_bias: Flag
    sample_size: Annotated[int, Strict(), Field(ge=1, le=256)]
    patch_size: Annotated[int, Strict(), Field(ge=1, le=16)]
    norm_elementwise_affine: Literal[False]
    norm_eps: Positive
    interpolation_scale: Positive | None
    guidance_embeds: Flag
    guidance_embeds_scale: Positive
    qk_norm: Literal["rms_norm_across_heads"] | None
    timestep_scale: Positive

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.out_channels not in (None, self.in_channels):
            raise ValueError(f"out_channels = {self.out_channels}: should be in_channels = {self.in_channels}")
        width = self.num_attention_heads * self.attention_head_dim
        if width > 2**14 or width % 4:
            raise ValueError(
                f"num_attention_heads * attention_head_dim = {width}: should be a multiple of 4, at most {2**14}"
            )
        if self.cross_attention_dim != width:
            raise ValueError(
                f"cross_attention_dim = {self.cross_attention_dim}: should be num_attention_heads *"
                f" attention_head_dim = {width}, the width of the projected text"
            )
        if self.num_cross_attention_heads * self.cross_attention_head_dim > 2**14:
            raise ValueError(f"num_cross_attention_heads * cross_attention_head_dim: should be at most {2**14}")
        if self.sample_size % self.patch_size:
            raise ValueError(
                f"sample_size = {self.sample_size}: should be a multiple of patch_size = {self.patch_size}"
            )
        return self


class Autoencoder(Facts):
    """diffusers' AutoencoderDC of RGB images."""

    in_channels: Literal[3]
    latent_channels: Count
    encoder_block_out_channels: Widths
    decoder_block_out_channels: Widths
    encoder_layers_per_block: Layers
    decoder_layers_per_block: Layers
    encoder_qkv_multiscales: Scales
    decoder_qkv_multiscales: Scales
    attention_head_dim: Count
    encoder_block_types: str | list[str]
    decoder_block_types: str | list[str]
    upsample_block_type: Literal["pixel_shuffle", "interpolate"]
    downsample_block_type: Literal["pixel_unshuffle", "conv"]
    decoder_norm_types: str | list[str]
    decoder_act_fns: str | list[str]
    encoder_out_shortcut: Flag
    decoder_in_shortcut: Flag
    decoder_conv_act_fn: str
    scaling_factor: Positive

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        """Both halves change the resolution as often, and say so for each of their blocks."""
        blocks = len(self.encoder_block_out_channels)
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != blocks:
                raise ValueError(f"{name} = {short(value)}: should be of {blocks}, as encoder_block_out_channels")
        return self


class FlowScheduler(Facts):
    """A scheduler of a flow-matching teacher, of which the shift is used."""

    prediction_type: Literal["flow_prediction", "trigflow"] | None = None
    use_dynamic_shifting: Literal[False] = False
    flow_shift: Positive | None = None
    shift: Positive | None = None


class Gemma(Facts):
    """transformers' Gemma2Model."""

    model_type: Literal["gemma2"]
    hidden_size: Count
    intermediate_size: Annotated[int, Strict(), Field(ge=1, le=2**18)] = 9216
    num_hidden_layers: Annotated[int, Strict(), Field(ge=1, le=256)] = 26
    num_attention_heads: Count = 8
    num_key_value_heads: Count = 4
    head_dim: Count = 256
    vocab_size: Annotated[int, Strict(), Field(ge=1, le=2**21)] = 256000


def check_config(config: Mapping[str, Any], facts: type[Facts], cls: Any, where: str) -> dict[str, Any]:
    """The configuration of a model of diffusers' class `cls` with the defaults of what it leaves out and without what
    is not the class's, which is ignored with a warning, as diffusers does.

    A key of the class that `facts` do not know may have its default alone.

    Raises:
        UserError: a value that is not supported, or another class.
    """
    if config.get("_class_name", cls.__name__) != cls.__name__:
        raise UserError(f"{where}: of the class {short(config['_class_name'])}; supported: {cls.__name__}")
    defaults = defaults_of(cls)
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    if unknown := sorted(given.keys() - defaults.keys() - {"quantization_config"}):
        _warn_once(
            f"{where}: ignoring keys that this diffusers' {cls.__name__} does not have: {', '.join(unknown[:9])}"
        )
    whole = defaults | {key: given[key] for key in defaults if key in given}
    check_facts({**given, **whole}, facts, where)
    for key in defaults.keys() - facts.model_fields.keys():
        if whole[key] != defaults[key]:
            raise UserError(f"{where}: {key} = {whole[key]!r} is not supported: should be {defaults[key]!r}")
    return whole


def check_facts(config: Mapping[str, Any], facts: type[Facts], where: str) -> None:
    """Raises UserError for the first value that is not supported; weights that are quantised are not."""
    if config.get("quantization_config"):
        raise UserError(f"{where}: quantization_config: quantised weights are not supported; take the original ones")
    try:
        facts.model_validate(config)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from None


def defaults_of(cls: Any) -> dict[str, Any]:
    """The keys of a configuration of diffusers' class `cls` and their defaults."""
    parameters = inspect.signature(cls.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def _explain(error: pydantic.ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if not first["loc"]:
        return message
    if first["type"] == "missing":
        return f"{first['loc'][0]} is missing"
    return f"{first['loc'][0]} = {short(first['input'])} is not supported: should be {message}"


def short(value: Any) -> str:
    """`repr` of what a file holds, which may be anything."""
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}..."


@cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
