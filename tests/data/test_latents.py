"""Latents from files are those that were written; whatever else is there is refused or made again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import NoHostSync
from safetensors.torch import load_file, save_file
from torch import Tensor

from tbcm.config.resolution import Size
from tbcm.data import latent_writer, latents
from tbcm.data.captions import PromptSource
from tbcm.data.latent_writer import LatentWriter
from tbcm.data.latents import PrecomputedLatents
from tbcm.errors import UserError
from tbcm.runtime.leftovers import temporary

SIZE: Size = (64, 64)

CAPTIONS = [f"caption {i} 🐼" for i in range(10)]  # 3 shards of 4
MADE_WITH = {"teacher.path": "here", "teacher.revision": None, "resolution": [[64, 64]], "scaling_factor": 0.7}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (latents, latent_writer):
        monkeypatch.setattr(module, "SHARD_IMAGES", 4)


def latent(index: int) -> Tensor:
    return torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(index))


class Encoder:
    """Remembers which images it encoded, and is killed at the call after `calls`."""

    def __init__(self, calls: int = 1000) -> None:
        self.calls, self.asked = calls, list[int]()

    def __call__(self, indices: Sequence[int]) -> Iterator[Tensor]:
        for start in range(0, len(indices), 2):
            if not self.calls:
                raise KeyboardInterrupt
            self.calls -= 1
            some = indices[start : start + 2]
            self.asked += some
            yield torch.stack([latent(i) for i in some])


def write(
    folder: Path, encoder: Any = None, captions: Sequence[str] = CAPTIONS, dtype: str = "float32", **made: Any
) -> LatentWriter:
    """As `tbcm.encode_images` does, two images at a time."""
    writer = LatentWriter(folder, {**MADE_WITH, "dtype": dtype, **made})
    writer.begin(captions)
    for name in writer.names:
        if not writer.is_whole(name):
            writer.write(name, (encoder or Encoder())(writer.indices(name)))
    writer.finish()
    return writer


def one_line(*words: str) -> Any:
    return pytest.raises(UserError, match="^[^\n]*" + "[^\n]*".join(words))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_latents_and_captions_of_any_images_in_any_order(tmp_path: Path, dtype: str) -> None:
    write(tmp_path / "c", dtype=dtype)
    data = PrecomputedLatents(tmp_path / "c")
    assert len(data) == 10 and list(data.captions) == CAPTIONS
    for indices in (range(10), [9, 0, 4, 4], [3]):
        found, taken = data.latents(indices, SIZE)
        assert taken == list(indices)
        assert found.dtype == torch.float32 and found.shape == (len(indices), 3, 2, 5)
        assert torch.equal(found, torch.stack([latent(i) for i in indices]).to(getattr(torch, dtype)).float())


def test_the_files_are_as_described(tmp_path: Path) -> None:
    write(tmp_path / "c", dtype="float16")
    files = sorted((tmp_path / "c").glob("*.safetensors"))
    assert [file.name for file in files] == [f"latents-0000{i}.safetensors" for i in range(3)]
    stored = [load_file(file)["latents"] for file in files]
    assert [tuple(t.shape) for t in stored] == [(4, 3, 2, 5), (4, 3, 2, 5), (2, 3, 2, 5)]
    assert all(t.dtype == torch.float16 for t in stored)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["images"] == 10 and manifest["shape"] == [3, 2, 5] and manifest["made_with"]["dtype"] == "float16"
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "c").iterdir() if path.name != "manifest.json"}
    assert {name: file["bytes"] for name, file in manifest["files"].items()} == sizes


def test_fp16_rounds_no_more_than_the_docstring_says() -> None:
    """Half a unit in the eleventh significant bit; bfloat16, of the same size, has eight."""
    some = torch.stack([latent(i) for i in range(10)])
    error = ((some.half().float() - some) / some).abs().max()
    assert error <= 2**-11 < ((some.bfloat16().float() - some) / some).abs().max()


def test_reading_waits_for_no_device_and_touches_only_what_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "c")
    data = PrecomputedLatents(tmp_path / "c")
    data.latents([0, 9], SIZE)  # opening a file is no part of a step
    with NoHostSync():
        data.latents([9, 1], SIZE)
    assert set(data._shards) == {"latents-00000.safetensors", "latents-00002.safetensors"}


@pytest.mark.parametrize("calls", range(6))
def test_killed_at_any_call_it_goes_on(tmp_path: Path, calls: int) -> None:
    whole, first, second = tmp_path / "whole", Encoder(calls), Encoder()
    write(whole)
    if calls < 5:  # 2, 2 and 1 pairs
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "c", first)
        with one_line(r"no cache of latents, or not a finished one \(manifest\.json\)", "run tbcm.encode_images again"):
            PrecomputedLatents(tmp_path / "c")
        temporary(tmp_path / "c" / "latents-00001.safetensors").write_bytes(b"of a killed process")
    else:
        write(tmp_path / "c", first)
    write(tmp_path / "c", second)
    assert second.asked == list(range({0: 0, 1: 0, 2: 4, 3: 4, 4: 8, 5: 10}[calls], 10))  # whole files are kept
    files = {path.name for path in (tmp_path / "c").iterdir()}
    assert files == {path.name for path in whole.iterdir()}
    assert json.loads((tmp_path / "c" / "manifest.json").read_text()) == json.loads(
        (whole / "manifest.json").read_text()
    )
    expected = PrecomputedLatents(whole).latents(range(10), SIZE)[0]
    assert torch.equal(PrecomputedLatents(tmp_path / "c").latents(range(10), SIZE)[0], expected)


def test_images_added_at_the_end_cost_only_themselves(tmp_path: Path) -> None:
    write(tmp_path / "c")
    more = Encoder()
    write(tmp_path / "c", more, [*CAPTIONS, "another", "a third", "a fourth"])
    assert more.asked == list(range(8, 13))  # those of the last file, which was not full, and the new ones
    fewer = Encoder()
    write(tmp_path / "c", fewer, CAPTIONS[:4])
    assert not fewer.asked and len(list((tmp_path / "c").glob("*.safetensors"))) == 1
    changed = Encoder()
    write(tmp_path / "c", changed, ["another caption", *CAPTIONS[1:4]])
    assert changed.asked == [0, 1, 2, 3]


def test_finished_latents_are_not_overwritten_with_others(tmp_path: Path) -> None:
    write(tmp_path / "c")
    before = (tmp_path / "c" / "manifest.json").read_bytes()
    with one_line(
        r"made otherwise \(there -> now\): resolution: \[\[64, 64\]\] -> \[\[32, 32\]\], dtype: float32 -> float16;"
    ):
        write(tmp_path / "c", dtype="float16", **{"resolution": [[32, 32]]})
    assert (tmp_path / "c" / "manifest.json").read_bytes() == before


def test_an_image_whose_latent_is_not_finite_is_named(tmp_path: Path) -> None:
    def encoder(bad: float, dtype: str) -> None:
        def encode(indices: Sequence[int]) -> Iterator[Tensor]:
            yield torch.stack([latent(i) * (bad if i == 6 else 1) for i in indices])

        write(tmp_path / "c", encode, dtype=dtype)

    for bad, dtype in ((float("nan"), "float32"), (1e6, "float16")):
        with one_line(f"image 6 .*caption 6.* not finite in {dtype}"):
            encoder(bad, dtype)
    encoder(1e6, "float32")


# Bad input


def test_latents_of_something_else_name_the_differences(tmp_path: Path) -> None:
    write(tmp_path / "c")
    data = PrecomputedLatents(tmp_path / "c")
    data.check(MADE_WITH)
    with one_line(
        r"data\.latents=.*/c does not match \(latents -> configuration\): teacher\.path: here -> there,"
        r" scaling_factor: 0\.7 -> 0\.41407; change the configuration, or run tbcm\.encode_images"
    ):
        data.check({**MADE_WITH, "teacher.path": "there", "scaling_factor": 0.41407})


def test_a_missing_or_cut_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "c")
    for path in [path for path in (tmp_path / "c").iterdir() if path.name != "manifest.json"]:
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with one_line(path.name, "damaged", "run tbcm.encode_images again"):
            PrecomputedLatents(tmp_path / "c")
        path.unlink()
        with one_line(path.name, "No such file", "run tbcm.encode_images again"):
            PrecomputedLatents(tmp_path / "c")
        path.write_bytes(content)
    assert torch.equal(PrecomputedLatents(tmp_path / "c").latents([5], SIZE)[0][0], latent(5))


@pytest.mark.parametrize(
    ("manifest", "words"),
    [("{", "damaged"), ('{"format": 2}', "format 2, this version reads 1"), ("[]", "damaged"), ("{}", "damaged")],
)
def test_a_manifest_that_is_none(tmp_path: Path, manifest: str, words: str) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    with one_line(r"manifest\.json", words):
        PrecomputedLatents(tmp_path)


def test_a_manifest_with_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    write(tmp_path / "c")
    path = tmp_path / "c" / "manifest.json"
    path.write_text(path.read_text().replace("latents-00001", "latents-\\ud800"))
    with one_line(r"surrogates not allowed; run tbcm.encode_images again"):
        PrecomputedLatents(tmp_path / "c")


def test_a_header_that_is_damaged_is_found_when_it_is_read(tmp_path: Path) -> None:
    write(tmp_path / "c")
    path = tmp_path / "c" / "latents-00001.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    data = PrecomputedLatents(tmp_path / "c")
    data.latents([0], SIZE)
    with one_line("latents-00001", "damaged", "run tbcm.encode_images again"):
        data.latents([0, 5], SIZE)


def test_files_that_are_written_again_under_a_reader_are_noticed(tmp_path: Path) -> None:
    write(tmp_path / "c")
    data = PrecomputedLatents(tmp_path / "c")

    def others(indices: Sequence[int]) -> Iterator[Tensor]:
        yield torch.stack([latent(100 + i) for i in indices])

    write(tmp_path / "c", others, CAPTIONS[::-1])
    with one_line("latents-00000.safetensors", "was encoded again"):
        data.latents([0], SIZE)


def test_a_shard_of_another_origin_is_not_taken_for_ours(tmp_path: Path) -> None:
    writer = write(tmp_path / "c")
    path = tmp_path / "c" / "latents-00001.safetensors"
    save_file(load_file(path), path)
    assert [name for name in writer.names if not writer.is_whole(name)] == [path.name]


def test_a_bad_image_gives_its_place_to_the_next(tmp_path: Path) -> None:
    """In the file too: what stands there is the next image's latent."""
    writer = LatentWriter(tmp_path / "c", {**MADE_WITH, "dtype": "float32"})
    writer.begin(CAPTIONS)
    bad = {3: 4, 8: 0, 9: 0}  # the last of a shard, and the last of all
    for name in writer.names:
        mine = writer.indices(name)
        writer.write(name, [torch.stack([latent(bad.get(i, i)) for i in mine])], [i for i in mine if i in bad])
    with one_line("3 of 10 images cannot be decoded, more than data.max_bad_share = 0.2 allows"):
        writer.finish(0.2)
    assert not (tmp_path / "c" / "manifest.json").exists()
    assert writer.finish(0.3)["bad"] == [3, 8, 9]
    data = PrecomputedLatents(tmp_path / "c")
    found, taken = data.latents(range(10), SIZE)
    assert len(data) == 10 and taken == [0, 1, 2, 4, 4, 5, 6, 7, 0, 0]
    assert torch.equal(found, torch.stack([latent(i) for i in taken]))


def test_several_captions_of_an_image_are_kept(tmp_path: Path) -> None:
    write(tmp_path / "c", captions=PromptSource.of("here", [["a", "b"], ["c"]]))
    captions = PrecomputedLatents(tmp_path / "c").captions
    assert captions.all_texts(0, 2) == [["a", "b"], "c"]
    assert {captions.drawn(0, epoch, seed=0) for epoch in range(20)} == {"a", "b"}
