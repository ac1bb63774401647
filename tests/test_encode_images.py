"""`tbcm.encode_images`, and training from what it wrote: the same run without a VAE and without images."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderDC
from PIL import Image
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from tiny import metrics, tiny_vae, write_config, write_teacher
from torch import Tensor

from tbcm import encode_images, train
from tbcm.config import load_config
from tbcm.data import latent_writer, latents
from tbcm.errors import UserError
from tbcm.setup.images import build_latents
from tbcm.setup.parts import build_parts
from tbcm.training.methods import build_method
from tbcm.training.random_parts import random_parts
from tbcm.training.trainer import Trainer

CPU = torch.device("cpu")
COUNT, SHARD = 10, 4


def pixels(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (latents, latent_writer):
        monkeypatch.setattr(module, "SHARD_IMAGES", SHARD)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, a configuration c.yaml of sCM, ten images in two shards, and their latents in fp32."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "prompts.txt").write_text("a prompt\n")
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for index in range(5 * shard, 5 * shard + 5):
                buffer = io.BytesIO()
                Image.fromarray(pixels(index)).save(buffer, "png")
                for name, content in ((f"{index}.png", buffer.getvalue()), (f"{index}.txt", b"image %d" % index)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    write_config(
        folder / "c.yaml",
        write_teacher(folder / "teacher"),
        folder / "prompts.txt",
        folder / "run",
        method={"name": "scm"},
        data={"images": str(folder / "*.tar")},
        train={"steps": 4},
        log={"every": 1},
    )
    with pytest.MonkeyPatch.context() as patch:
        for module in (latents, latent_writer):
            patch.setattr(module, "SHARD_IMAGES", SHARD)
        encode_here(str(folder), str(folder / "fp32"))
    return folder


def encode_here(home: str, out: str, dtype: str = "float32") -> None:
    encode_images.encode_dataset(load_config(Path(home) / "c.yaml"), out, CPU, dtype=dtype, batch=2)


def encode_in_small_shards(home: str, out: str) -> None:
    latents.SHARD_IMAGES = latent_writer.SHARD_IMAGES = SHARD
    encode_here(home, out)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process: exit code, stdout, stderr."""

    def run(main: Callable[[], int], *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tbcm", *map(str, arguments)])
        code = main()
        return code, *capsys.readouterr()

    return run


Call = Callable[..., tuple[int, str, str]]


def stored(folder: Path) -> Tensor:
    return torch.cat([load_file(path)["latents"] for path in sorted(folder.glob("latents-*.safetensors"))])


def from_latents(folder: Path) -> list[str]:
    return ["data.images=null", f"data.latents={folder}"]


def test_what_is_stored_is_the_vaes_scaled_latent_of_each_image(home: Path) -> None:
    vae = tiny_vae().eval()
    images = torch.stack([torch.from_numpy(pixels(i)).permute(2, 0, 1) for i in range(COUNT)]) / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(images).latent * 0.7
    torch.testing.assert_close(stored(home / "fp32"), expected, rtol=1e-4, atol=1e-5)
    black = next((home / "fp32").glob("black_latent-*.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(load_file(black)["64"], vae.encode(-torch.ones(1, 3, 64, 64)).latent[0] * 0.7)


def trained(home: Path, out: Path, *overrides: str) -> tuple[dict[str, Tensor], list[float]]:
    """The student's weights and losses of a short run."""
    config = load_config(home / "c.yaml", [f"out={out}", *overrides])
    trainer = Trainer(config, CPU, build_parts(config, CPU))
    trainer.run()
    return trainer.student.state_dict(), [row["loss"] for row in metrics(out)]


def test_latents_in_fp32_are_the_same_run_to_rounding(home: Path, tmp_path: Path) -> None:
    weights, losses = trained(home, tmp_path / "images")
    ours, our_losses = trained(home, tmp_path / "latents", *from_latents(home / "fp32"))
    assert our_losses == pytest.approx(losses, rel=1e-4) and len(losses) == 4
    for name in weights:
        torch.testing.assert_close(ours[name], weights[name], rtol=1e-3, atol=1e-4)
    encode_here(str(home), str(tmp_path / "fp16"), "float16")
    assert trained(home, tmp_path / "half", *from_latents(tmp_path / "fp16"))[1] == pytest.approx(losses, rel=1e-2)


def test_training_loads_no_vae_and_no_images(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a VAE was loaded")

    monkeypatch.setattr(AutoencoderDC, "from_pretrained", refuse)
    with pytest.raises(UserError, match="a VAE was loaded"):
        trained(home, tmp_path / "images")
    monkeypatch.setattr("tbcm.setup.images.open_images", refuse)
    trained(home, tmp_path / "latents", *from_latents(home / "fp32"))


def test_two_ranks_write_what_one_writes(home: Path, tmp_path: Path) -> None:
    on_ranks(2, encode_in_small_shards, str(home), str(tmp_path / "two"))
    one, two = (json.loads((folder / "manifest.json").read_text()) for folder in (home / "fp32", tmp_path / "two"))
    assert one.pop("files").keys() == two.pop("files").keys() and one == two  # threads round differently
    torch.testing.assert_close(stored(tmp_path / "two"), stored(home / "fp32"), rtol=1e-4, atol=1e-5)


def test_it_says_what_it_did_goes_on_and_does_nothing_twice(home: Path, tmp_path: Path, call: Call) -> None:
    command = encode_images.main, home / "c.yaml", tmp_path / "out", "--batch", 3
    code, _, said = call(*command)
    assert code == 0 and "10/10" in said and "10 latents of 4 x 8 x 8" in said
    assert stored(tmp_path / "out").dtype == torch.float16
    shards = sorted((tmp_path / "out").glob("latents-*"))
    before = [shard.stat().st_mtime_ns for shard in shards]
    (tmp_path / "out" / "manifest.json").unlink()
    shards[1].unlink()
    code, _, said = call(*command)
    assert code == 0 and "4/4" in said and "2 files were there already" in said
    after = [shard.stat().st_mtime_ns for shard in shards]
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, False, True]
    code, _, said = call(*command)
    assert code == 0 and "3 files were there already" in said and [s.stat().st_mtime_ns for s in shards] == after


def test_dry_runs_have_latents_and_no_vae(home: Path) -> None:
    with_vae = random_parts(load_config(home / "c.yaml"), CPU)
    config = load_config(home / "c.yaml", from_latents(home / "fp32"))
    parts = random_parts(config, CPU)
    assert with_vae.vae is not None and parts.vae is None
    (batch,) = build_method(config, CPU, parts).source(0)
    (other,) = build_method(load_config(home / "c.yaml"), CPU, with_vae).source(0)
    assert batch.trajectory.x0.shape == other.trajectory.x0.shape == (4, 4, 8, 8)


def assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    code, _, said = result
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and all(word in line for word in words), line


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.latents={home}/fp32"], ["method.name=scm needs data.images", "with data.images=null"]),
        (["data.images=null"], ["method.name=scm needs data.images", "data.latents"]),
        (["data.images=null", "data.latents={home}/nowhere"], ["nowhere", "tbcm.encode_images"]),
        (
            ["data.images=null", "data.latents={home}/fp32", "resolution=128"],
            ["resolution: [[64, 64]] -> [[128, 128]]", "latents -> configuration"],
        ),
        (
            ["data.images=null", "data.latents={home}/fp32", "teacher.path={home}/other"],
            ["teacher.path: {home}/teacher -> {home}/other, scaling_factor: 0.7 -> 0.8;"],
        ),
        (["data.images={home}/none/*.tar"], ["no such folder of images, nor .tar"]),
    ],
)
def test_what_cannot_be_trained_on(
    home: Path, tmp_path: Path, call: Call, overrides: list[str], words: list[str]
) -> None:
    other = home / "other"
    if not other.exists():
        shutil.copytree(home / "teacher", other)
        vae = json.loads((other / "vae" / "config.json").read_text())
        (other / "vae" / "config.json").write_text(json.dumps({**vae, "scaling_factor": 0.8}))
    given = [f"out={tmp_path / 'run'}", *(o.format(home=home) for o in overrides)]
    assert_one_line(call(train.main, home / "c.yaml", *given), *(word.format(home=home) for word in words))


def test_bad_input_of_the_command(home: Path, tmp_path: Path, call: Call) -> None:
    def error(*arguments: object) -> tuple[int, str, str]:
        return call(encode_images.main, home / "c.yaml", *arguments)

    assert_one_line(error(tmp_path / "c", "--batch", 0), "--batch 0")
    tree = yaml.safe_load((home / "c.yaml").read_text())
    without = {**tree, "method": {"name": "tbcm"}, "data": {**tree["data"], "images": None}}
    (tmp_path / "tbcm.yaml").write_text(yaml.safe_dump(without))
    found = call(encode_images.main, tmp_path / "tbcm.yaml", tmp_path / "c")
    assert_one_line(found, "no images to encode", "data.images")
    assert_one_line(error(tmp_path / "c", "data.images=nowhere"), "nowhere: no such folder of images")
    assert_one_line(error(tmp_path / "c", "data.surprise=1"), "data.surprise")
    assert_one_line(error(tmp_path / "c", "resolution=100"), "resolution = 100", "multiples of 8")
    assert_one_line(error(home / "fp32"), "dtype: float32 -> float16")
    assert_one_line(error(home / "fp32", "--dtype", "fp32", f"data.images={home}/0.tar"), "data.images: ", "0.tar")


def test_bad_images_are_skipped_alike_with_and_without_latents(home: Path, tmp_path: Path, call: Call) -> None:
    """Two of ten images cannot be decoded and one has two captions: encoded or not, it is the same run."""
    images = tmp_path / "images"
    images.mkdir()
    for index in range(COUNT):
        Image.fromarray(pixels(index)).save(images / f"{index}.png")
        (images / f"{index}.json").write_text(json.dumps({"text": [f"image {index}", "another"][: 1 + (index == 2)]}))
    for index in (3, 9):
        (images / f"{index}.png").write_bytes(b"not an image")
    given = [f"data.images={images}", "data.max_bad_share=0.2"]
    code, _, said = call(encode_images.main, home / "c.yaml", tmp_path / "out", "--dtype", "fp32", *given)
    assert code == 0 and "10 latents of 4 x 8 x 8" in said and "2 of them of bad images" in said
    weights, losses = trained(home, tmp_path / "run", *given)
    ours, our_losses = trained(home, tmp_path / "encoded", *from_latents(tmp_path / "out"))
    assert our_losses == pytest.approx(losses, rel=1e-4)
    for name in weights:
        torch.testing.assert_close(ours[name], weights[name], rtol=1e-3, atol=1e-4)
    assert_one_line(
        call(train.main, home / "c.yaml", f"out={tmp_path / 'no'}", f"data.images={images}"),
        *("of 10 samples are bad, more than data.max_bad_share = 0.05 allows", "cannot be decoded"),
    )


@pytest.mark.parametrize("how", ["relative", "link", "moved", "retrained"])
def test_latents_are_known_by_the_vae_not_by_its_path(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call, how: str
) -> None:
    teacher, cache = tmp_path / "teacher", shutil.copytree(home / "fp32", tmp_path / "fp32")
    monkeypatch.chdir(tmp_path)
    if how == "link":
        teacher.symlink_to(home / "teacher")
    else:
        shutil.copytree(home / "teacher", teacher)
    if how == "retrained":
        file = teacher / "vae" / "diffusion_pytorch_model.safetensors"
        save_file({name: tensor + 1e-3 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    given = "teacher.path=../" + os.path.relpath(teacher, tmp_path.parent)
    config = load_config(home / "c.yaml", [*from_latents(cache), given])
    again = [encode_images.main, home / "c.yaml", cache, given, "--dtype", "fp32"]
    if how == "retrained":
        with pytest.raises(UserError, match=f"teacher.path: {home}/teacher -> {teacher};"):
            build_latents(config, CPU)
        assert_one_line(call(*again), "holds a cache that was made otherwise")
    else:
        assert len(build_latents(config, CPU)[0]) == COUNT
        code, _, said = call(*again)
        assert code == 0 and "3 files were there already" in said
        assert len(list(cache.glob("black_latent-*"))) == 1
