"""A pipeline's configuration files of a preset: a folder without weights, from which dry runs are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tbcm.models.families.presets import PRESETS
from tbcm.models.sana.presets import SANA, sana
from tbcm.runtime.files import write_json

ARCHITECTURES = *SANA, *PRESETS
"""Names of presets."""


def write_preset(name: str, folder: Path) -> None:
    """Writes model_index.json, and for each component its configuration, or a tokenizer that knows one word."""
    preset = sana(name) if name in SANA else PRESETS[name]
    index: dict[str, Any] = {"_class_name": preset["_class_name"]}
    for part, what in preset.items():
        if part == "_class_name":
            continue
        if isinstance(what, int):
            tokenizer = _tokenizer(what)
            tokenizer.save_pretrained(folder / part)
            index[part] = ["transformers", type(tokenizer).__name__]
            continue
        cls, config = what
        index[part] = ["transformers" if part.startswith("text_encoder") else "diffusers", cls]
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part).mkdir()
        write_json(folder / part / file, {"_class_name": cls, **config})
    write_json(folder / "model_index.json", index)


def _tokenizer(length: int) -> Any:
    """Every word is the same token, and `length` of them are read."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<word>": 1}, unk_token="<word>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<word>", model_max_length=length
    )
