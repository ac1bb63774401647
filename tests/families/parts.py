"""What tiny pipelines are made of: tokenizers, encoders, autoencoders, and the list of those that make them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import diffusers as d
import transformers as hf
from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig
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


def chatglm_words() -> Any:
    """ChatGLM's own tokenizer, which pads on the left, over a vocabulary that sentencepiece makes of these words."""
    import sentencepiece  # not needed for the others

    file = Path(_folder().name) / "tokenizer.model"
    with file.open("wb") as opened:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([" ".join(WORDS)]),
            model_writer=opened,
            model_type="word",
            vocab_size=len(WORDS) + 3,
            normalization_rule_name="identity",
            minloglevel=2,
        )
    return ChatGLMTokenizer(str(file))


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """It lasts as long as the process: the tokenizer reads its file again where it is saved."""
    return tempfile.TemporaryDirectory()


def chatglm() -> Any:
    config = ChatGLMConfig(
        num_layers=3,
        padded_vocab_size=64,
        hidden_size=16,
        ffn_hidden_size=16,
        kv_channels=8,
        num_attention_heads=2,
        seq_length=256,
        multi_query_attention=True,
        multi_query_group_num=1,
        original_rope=True,
        add_qkv_bias=True,
    )
    model = ChatGLMModel(config, empty_init=False)
    for module in model.modules():
        if type(module).__name__ == "RMSNorm":  # its class allocates the weight and leaves it as it is
            nn.init.ones_(module.weight)
    return model


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
