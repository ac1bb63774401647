"""Text states from files are those of the encoder that made them; whatever else is there is refused or made again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import NoHostSync
from safetensors.torch import load_file, save_file
from tiny import PROMPTS, HashEncoder
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from tbcm.data import embedding_writer, embeddings
from tbcm.data.captions import PromptSource
from tbcm.data.embedding_writer import CacheWriter
from tbcm.data.embeddings import CachedEncoder
from tbcm.data.prompts import load_prompts
from tbcm.errors import UserError
from tbcm.models.text import GemmaEncoder, MiniLMEncoder, TextEncoder, encode_null
from tbcm.runtime.leftovers import temporary

REPEATED = [*PROMPTS[:5], PROMPTS[2], *PROMPTS[5:], "a longer prompt 桜 🐼", PROMPTS[0]]  # 10 distinct: 3 shards of 4


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (embeddings, embedding_writer):
        monkeypatch.setattr(module, "SHARD_PROMPTS", 4)


class Counted:
    """An encoder that remembers what it was asked for, and is killed at the call after `calls`."""

    def __init__(self, encoder: TextEncoder, calls: int = 1000) -> None:
        self.encoder, self.calls, self.asked = encoder, calls, list[list[str]]()

    def encode(self, prompts: list[str], *, instruct: bool = True) -> tuple[Tensor, Tensor]:
        if len(self.asked) == self.calls:
            raise KeyboardInterrupt
        self.asked.append(prompts)
        return self.encoder.encode(prompts, instruct=instruct)


def source(folder: Path, prompts: list[str]) -> PromptSource:
    path = folder.parent / "prompts.txt"
    path.write_text("\n".join(prompts))
    return load_prompts(path, folder=folder.parent / "clean")


def write(
    folder: Path, encoder: Any, prompts: list[str] = REPEATED, dtype: str = "float32", **made: Any
) -> CacheWriter:
    """As `tbcm.encode` does, two prompts at a time."""
    length = getattr(encoder, "max_tokens", 5)
    writer = CacheWriter(folder, {"text.max_tokens": length, "dtype": dtype, **made})
    given = source(folder, prompts)
    writer.begin(given)
    for name in writer.names:
        if not writer.is_whole(name):
            mine = writer.prompts(name)
            batches = (mine[i : i + 2] for i in range(0, len(mine), 2))
            writer.write(name, (encoder.encode(some, instruct=name != "null.safetensors") for some in batches))
    writer.finish(given)
    return writer


def assert_same(cached: CachedEncoder, encoder: TextEncoder, prompts: list[str], dtype: torch.dtype) -> None:
    for (ours, our_mask), (embeds, mask) in (
        (cached.encode(prompts), encoder.encode(prompts)),
        (encode_null(cached), encode_null(encoder)),
    ):
        assert ours.shape == embeds.shape and ours.dtype == torch.float32
        assert our_mask.dtype == torch.bool and torch.equal(our_mask, mask)
        assert torch.equal(ours[mask], embeds[mask].to(dtype).float())
        assert not ours[~mask].any()
    assert (cached.dim, cached.max_tokens) == (encoder.dim, encoder.max_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_any_prompts_in_any_order(tmp_path: Path, dtype: torch.dtype) -> None:
    write(tmp_path / "c", HashEncoder(), dtype=str(dtype).removeprefix("torch."))
    cached = CachedEncoder(tmp_path / "c")
    for prompts in (REPEATED, REPEATED[::-1], [REPEATED[-2]], [PROMPTS[3]] * 3):
        assert_same(cached, HashEncoder(), prompts, dtype)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert (manifest["prompts"], manifest["distinct_prompts"]) == (12, 10)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "c").iterdir() if path.name != "manifest.json"}
    assert {name: file["bytes"] for name, file in manifest["files"].items()} == sizes
    assert manifest["prompts_that_fill_max_tokens"] == 1  # of HashEncoder: 12 characters and more


def test_minilm(tmp_path: Path) -> None:
    encoder, prompts = MiniLMEncoder(8), ["a red panda", "a cat", "word" + " word" * 50, "grinning face"]
    write(tmp_path / "c", encoder, prompts)
    cached = CachedEncoder(tmp_path / "c")
    for pair in (prompts[:2], prompts[2:]):  # the very batches, for equality to the bit
        assert_same(cached, encoder, pair, torch.float32)


@pytest.mark.parametrize("instruction", [["Describe with care:", "User Prompt: "], None])
@pytest.mark.parametrize("max_tokens", [8, 40])
def test_gemma_with_its_instruction_cut_away(tmp_path: Path, instruction: list[str] | None, max_tokens: int) -> None:
    """What is kept of Gemma's sequence, <bos> and the last tokens, has its padding at the end like any other."""
    encoder = GemmaEncoder(tiny_tokenizer(), tiny_gemma(), instruction, max_tokens)
    prompts = ["A Red Panda", "x", "a photo of a cat sitting on a tree, " * 3 + "end", "two words"]
    write(tmp_path / "c", encoder, prompts)
    for pair in (prompts[:2], prompts[2:]):
        assert_same(CachedEncoder(tmp_path / "c"), encoder, pair, torch.float32)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte a token, <bos> in front."""
    specials = ["<pad>", "<bos>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>", unk_token="<unk>")


def tiny_gemma() -> Gemma2Model:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "head_dim": 8, "sliding_window": 32}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return Gemma2Model(Gemma2Config(vocab_size=260, pad_token_id=0, bos_token_id=1, **sizes, **heads)).eval()


def test_reading_waits_for_no_device_and_touches_only_what_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "c", HashEncoder())
    cached = CachedEncoder(tmp_path / "c")
    cached.encode([PROMPTS[0], PROMPTS[8]])  # opening a file is no part of a step
    with NoHostSync():
        cached.encode([PROMPTS[0], PROMPTS[8]])
    assert set(cached._shards) == {"shard-00000.safetensors", "shard-00002.safetensors"}


def test_prompts_that_were_not_encoded(tmp_path: Path) -> None:
    write(tmp_path / "c", HashEncoder())
    cached = CachedEncoder(tmp_path / "c")
    assert PROMPTS[0] in cached and "nothing" not in cached and "" not in cached and "zzz" not in cached
    for unknown in ("nothing", "", "zzz", PROMPTS[0] + " "):
        with pytest.raises(UserError, match="no states of the prompt"):
            cached.encode([PROMPTS[0], unknown])
    with pytest.raises(UserError, match="null prompt only"):
        cached.encode([PROMPTS[0]], instruct=False)


# Killed and started again


def finished(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("calls", range(7))
def test_killed_at_any_call_it_goes_on(tmp_path: Path, calls: int) -> None:
    write(tmp_path / "whole", HashEncoder())
    first, second = Counted(HashEncoder(), calls), Counted(HashEncoder())
    if calls < 6:  # [""] and 2, 2 and 1 pairs
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "c", first)
        with pytest.raises(UserError, match=r"not a finished one \(manifest\.json\)"):
            CachedEncoder(tmp_path / "c")
        temporary(tmp_path / "c" / "shard-00001.safetensors").write_bytes(b"of a killed process")
    else:
        write(tmp_path / "c", first)
    write(tmp_path / "c", second)
    assert len(second.asked) == 6 - {0: 0, 1: 1, 2: 1, 3: 3, 4: 3, 5: 5, 6: 6}[calls]  # whole files are kept
    expected, found = finished(tmp_path / "whole"), finished(tmp_path / "c")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name][key], expected[name][key]) for name in expected for key in expected[name])
    assert not list((tmp_path / "c").glob(".tbcm-*"))


def test_prompts_added_at_the_end_cost_only_themselves(tmp_path: Path) -> None:
    write(tmp_path / "c", HashEncoder())
    more = Counted(HashEncoder())
    write(tmp_path / "c", more, [*REPEATED, "a new one", PROMPTS[1], "another", "a third"])
    assert [prompt for some in more.asked for prompt in some] == [*REPEATED[9:11], "a new one", "another", "a third"]
    fewer = Counted(HashEncoder())
    write(tmp_path / "c", fewer, REPEATED[:4])
    assert not fewer.asked and sorted(finished(tmp_path / "c")) == ["null.safetensors", "shard-00000.safetensors"]
    assert_same(CachedEncoder(tmp_path / "c"), HashEncoder(), REPEATED[:4], torch.float32)


def test_a_finished_cache_is_not_overwritten_with_another(tmp_path: Path) -> None:
    write(tmp_path / "c", HashEncoder(), **{"text.encoder": "minilm"})
    before = (tmp_path / "c" / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=r"dtype: float32 -> bfloat16, text\.encoder: minilm -> gemma2;"):
        write(tmp_path / "c", HashEncoder(), dtype="bfloat16", **{"text.encoder": "gemma2"})
    assert (tmp_path / "c" / "manifest.json").read_bytes() == before


def test_an_unfinished_cache_of_another_kind_is_made_anew(tmp_path: Path) -> None:
    write(tmp_path / "c", HashEncoder(), **{"text.path": "a"})
    (tmp_path / "c" / "manifest.json").unlink()
    again = Counted(HashEncoder())
    write(tmp_path / "c", again, **{"text.path": "b"})
    assert len(again.asked) == 6


def test_masks_with_holes_are_refused(tmp_path: Path) -> None:
    class Left(HashEncoder):
        def encode(self, prompts: list[str], *, instruct: bool = True) -> tuple[Tensor, Tensor]:
            embeds, mask = super().encode(prompts, instruct=instruct)
            return embeds, mask.flip(1)

    with pytest.raises(ValueError, match="padding"):
        write(tmp_path / "c", Left())


# Bad input


def one_line(*words: str) -> Any:
    return pytest.raises(UserError, match=".*".join(words))


def test_a_cache_of_something_else_names_the_differences(tmp_path: Path) -> None:
    write(tmp_path / "c", HashEncoder(), **{"text.encoder": "minilm", "text.path": None, "instruction": "abc"})
    cached, digest = CachedEncoder(tmp_path / "c"), source(tmp_path / "c", REPEATED).digest()
    same = {"data.prompts": digest, "text.encoder": "minilm", "text.path": None, "instruction": "abc"}
    cached.check(same)
    different = (
        r"cache -> configuration\): data\.prompts: \w{16} -> 0, text\.path: None -> x, text\.max_tokens: 5 -> 7;"
    )
    with one_line(different):
        cached.check({**same, "data.prompts": "0", "text.path": "x", "text.max_tokens": 7})


def files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.name != "manifest.json")


def test_a_missing_or_cut_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "c", HashEncoder())
    for path in files(tmp_path / "c"):
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with one_line(path.name, "damaged", "run tbcm.encode again"):
            CachedEncoder(tmp_path / "c")
        path.unlink()
        with one_line(path.name, "No such file", "run tbcm.encode again"):
            CachedEncoder(tmp_path / "c")
        path.write_bytes(content)
    assert_same(CachedEncoder(tmp_path / "c"), HashEncoder(), REPEATED, torch.float32)


@pytest.mark.parametrize(
    ("manifest", "words"),
    [("{", "damaged"), ('{"format": 2}', "format 2, this version reads 1"), ("[]", "damaged"), ("{}", "damaged")],
)
def test_a_manifest_that_is_none(tmp_path: Path, manifest: str, words: str) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    with one_line(r"manifest\.json", words):
        CachedEncoder(tmp_path)


def test_a_header_that_is_damaged_is_found_when_it_is_read(tmp_path: Path) -> None:
    write(tmp_path / "c", HashEncoder())
    path = tmp_path / "c" / "shard-00001.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    cached = CachedEncoder(tmp_path / "c")
    cached.encode([PROMPTS[0]])
    with one_line("shard-00001", "damaged", "run tbcm.encode again"):
        cached.encode([PROMPTS[5]])


def test_a_flipped_bit_is_found_by_its_digest(tmp_path: Path) -> None:
    writer = write(tmp_path / "c", HashEncoder())
    path = tmp_path / "c" / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    assert all(writer.is_whole(name) for name in writer.names)
    assert [name for name in writer.names if not writer.is_whole(name, verify=True)] == [path.name]


def test_a_shard_of_another_origin_is_not_taken_for_ours(tmp_path: Path) -> None:
    writer = write(tmp_path / "c", HashEncoder())
    path = tmp_path / "c" / "shard-00001.safetensors"
    save_file(load_file(path), path)
    assert [name for name in writer.names if not writer.is_whole(name)] == [path.name]


def test_a_cache_that_is_encoded_again_under_a_reader_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "c", HashEncoder(), ["a", "b", "c"])
    cached = CachedEncoder(tmp_path / "c")
    write(tmp_path / "c", HashEncoder(), ["c", "x", "b"])
    with one_line("shard-00000.safetensors", "was encoded again"):
        cached.encode(["a"])
