"""Images of several sizes: each step has one of them, and with it shapes, conditions, graphs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_config, tiny_parts, write_teacher
from torch import Tensor
from training.test_trainer import assert_equal, tensors

from tbcm.config import Config
from tbcm.config.resolution import MOST_SIZES, Size, largest, parse_size
from tbcm.data.images import open_images
from tbcm.errors import UserError
from tbcm.inference.generation import open_sampler
from tbcm.models.differentiation.compiling import compiled
from tbcm.models.pipeline import Pipeline
from tbcm.samples.noised import VaeLatents
from tbcm.samples.rollouts import draw_size
from tbcm.setup.images import build_black_latents
from tbcm.setup.networks import check_sizes
from tbcm.setup.parts import build_parts
from tbcm.training import dryrun
from tbcm.training.trainer import Trainer

CPU = torch.device("cpu")
BUCKETS: list[list[int]] = [[64, 64], [48, 80], [80, 48]]
SIZES: list[Size] = [(64, 64), (48, 80), (80, 48)]


def config(out: Path, **sections: Any) -> Config:
    return tiny_config(out, **{"resolution": BUCKETS, **sections})


def trainer(out: Path, **sections: Any) -> Trainer:
    made = config(out, **sections)
    return Trainer(made, CPU, tiny_parts(made))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (512, ((512, 512),)),
        ([512, 768], ((512, 768),)),
        ([[512, 768]], ((512, 768),)),
        ([[512, 768], [768, 512], 640], ((512, 768), (768, 512), (640, 640))),
    ],
)
def test_ways_to_write_a_resolution(tmp_path: Path, written: Any, meant: Any) -> None:
    assert config(tmp_path, resolution=written).resolution == meant


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ([512, 640, 768], r"\[\[1024, 1024\], \[832, 1216\]\]"),
        ("1024x768", r"\[height, width\]"),
        ([], r"\[height, width\]"),
        (None, r"\[height, width\]"),
        (True, r"\[height, width\]"),
        (64.5, r"\[height, width\]"),
        ([[64, 64, 64]], r"\[height, width\]"),
        ({"pixels": 64}, r"\[height, width\]"),
        (0, "at least 1 pixel"),
        ([[64, 64], [64, -8]], "at least 1 pixel"),
        ([[64, 64], 64], "each size once"),
        ([[64, 8 * i] for i in range(1, 34)], "at most 32 sizes"),
    ],
)
def test_what_is_no_resolution_is_said_in_one_line(tmp_path: Path, written: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        config(tmp_path, resolution=written)
    assert "resolution" in str(caught.value) and "\n" not in str(caught.value)


def test_the_former_key_is_answered_with_the_new_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"teacher\.image_size \(value 64\) is now called resolution"):
        config(tmp_path, teacher={"path": "x", "image_size": 64})


def test_precomputed_latents_are_of_one_size(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="latents of one size, and resolution names 3"):
        config(tmp_path, method={"name": "scm"}, data={"prompts": "x", "images": None, "latents": "y"})


def test_sizes_on_a_command_line() -> None:
    assert parse_size("48x80") == (48, 80) and parse_size("64") == (64, 64)
    for text in ("", "0", "64x", "x64", "64x64x64", "-64", "64.0"):
        with pytest.raises(UserError, match="is no size: write HEIGHTxWIDTH"):
            parse_size(text)
    assert largest(SIZES) == (64, 64)


def test_a_steps_size_is_a_function_of_seed_and_step_each_as_likely() -> None:
    drawn = [draw_size(SIZES, 0, step) for step in range(3000)]
    assert drawn == [draw_size(SIZES, 0, step) for step in range(3000)]
    assert drawn != [draw_size(SIZES, 1, step) for step in range(3000)]
    for size in SIZES:
        assert abs(drawn.count(size) - 1000) < 5 * (3000 * 1 / 3 * 2 / 3) ** 0.5
    assert {draw_size(SIZES[:1], seed, 7) for seed in range(9)} == {SIZES[0]}


def test_batches_of_a_step_are_of_its_size(tmp_path: Path) -> None:
    source = trainer(tmp_path, train={"steps": 6, "prompts_per_step": 4, "prompts_per_rollout": 3}).source
    for step in range(6):
        height, width = draw_size(SIZES, 0, step)
        batches = list(source(step))
        assert [batch.trajectory.x0.shape[0] for batch in batches] == [3, 1]
        for batch in batches:
            assert batch.trajectory.x.shape[2:] == (4, height // 8, width // 8) == batch.trajectory.x0.shape[1:]


def test_the_brightness_filter_compares_with_black_of_the_same_size(tmp_path: Path) -> None:
    made = config(tmp_path, method={"brightness_threshold": 1e-9, "route": {"points": 2}})
    parts = tiny_parts(made)
    source = Trainer(made, CPU, parts).source
    ends = {draw_size(SIZES, 0, step): next(iter(source(step))).trajectory.x0 for step in range(8)}
    for size, x0 in ends.items():  # a prompt that ends in "black" itself is dropped, whatever the size
        parts.black[size].copy_(x0[0] / made.method.sigma_data)  # type: ignore[index]
    for step in range(8):
        batch = next(iter(source(step)))
        if torch.equal(batch.trajectory.x0, ends[draw_size(SIZES, 0, step)]):
            assert batch.keep.tolist() == [False] + [True] * (len(batch.keep) - 1)


@pytest.mark.parametrize("method", ["tbcm", "scm", "sprint", "dmd2"])
def test_a_run_over_three_sizes_resumes_bit_for_bit(tmp_path: Path, method: str) -> None:
    train = {"steps": 6, "prompts_per_step": 4, "overlap_rollout": True, "seed": 1}
    settings = {"method": {"name": method}, "train": train}
    assert {draw_size(SIZES, 1, step) for step in range(6)} == set(SIZES)
    whole = trainer(tmp_path / "whole", **settings)
    whole.run()
    first = trainer(tmp_path / "parts", **settings)
    for _ in range(3):
        first.train_step()
    first.save()
    first.writer.wait()
    again = trainer(tmp_path / "parts", **settings)
    again.resume()
    again.run()
    assert_equal(tensors(whole), tensors(again))


@pytest.mark.usefixtures("fresh_compiler")
def test_nothing_is_compiled_after_each_size_was_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[None] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(None)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    run = trainer(tmp_path, student={"compile": True}, teacher={"compile": True}, train={"seed": 1})
    seen: set[Size] = set()
    for step in range(7):
        seen.add(draw_size(SIZES, 1, step))
        run.train_step()
        assert len(graphs) == 2 * len(seen)  # a block of the teacher and one of the student
    assert seen == set(SIZES)


@pytest.mark.usefixtures("fresh_compiler")
def test_more_sizes_than_a_compiler_keeps_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its limit of 8 recompilations is an error in a function that is to be compiled whole."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    double = compiled(lambda x: 2 * x, fold=False)
    for size in range(1, MOST_SIZES + 1):
        assert double(torch.ones(size)).sum() == 2 * size


def test_images_are_cropped_to_the_steps_size(tmp_path: Path) -> None:
    from tiny import tiny_vae

    for i in range(3):
        Image.new("RGB", (100, 60), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    encoded = VaeLatents(Pipeline("unused"), tiny_vae().eval(), open_images(str(tmp_path)), CPU)
    for height, width in SIZES:
        latents, taken = encoded.latents([2, 0], (height, width))
        assert latents.shape == (2, 4, height // 8, width // 8) and taken == [2, 0]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def of(teacher: Path, out: Path, **sections: Any) -> Config:
    (out / "prompts.txt").write_text("a red ball\na blue ball\n")
    data = {"prompts": str(out / "prompts.txt")}
    return config(out / "run", teacher={"path": str(teacher), "null_mask": "own"}, data=data, **sections)


def test_a_black_latent_of_each_size_is_made_once_and_kept(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[None] = []
    load_vae = Pipeline.load_vae

    def counted(self: Pipeline, dtype: torch.dtype) -> Any:
        loads.append(None)
        return load_vae(self, dtype)

    monkeypatch.setattr(Pipeline, "load_vae", counted)
    one = build_black_latents(of(teacher, tmp_path, resolution=64), CPU)
    black = build_black_latents(of(teacher, tmp_path), CPU)
    assert len(loads) == 2 and list(black) == SIZES and torch.equal(one[64, 64], black[64, 64])
    vae = load_vae(Pipeline(str(teacher)), torch.float32)
    for size, latent in black.items():
        expected = Pipeline(str(teacher)).encode(vae, -torch.ones(1, 3, *size))[0]
        torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-5)
    again = build_black_latents(of(teacher, tmp_path), CPU)
    assert len(loads) == 2 and all(torch.equal(again[size], black[size]) for size in SIZES)
    (file,) = (tmp_path / "run").glob("black_latent-*.safetensors")
    assert sorted(load_file(file)) == ["48x80", "64", "80x48"]


def test_a_size_that_the_teacher_cannot_make_is_said_before_anything_is_loaded(teacher: Path, tmp_path: Path) -> None:
    made = of(teacher, tmp_path, resolution=[[64, 64], [64, 100]])
    with pytest.raises(UserError, match="resolution = 64x100: sides should be multiples of 8 for this teacher"):
        check_sizes(made)
    with pytest.raises(UserError, match="64x100"):
        build_parts(made, CPU)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("black*"))


def test_a_run_is_sampled_in_any_size_and_by_default_in_its_first(teacher: Path, tmp_path: Path) -> None:
    made = of(teacher, tmp_path, text={"encoder": "minilm"}, train={"steps": 1, "prompts_per_step": 2})
    Trainer(made, CPU, build_parts(made, CPU)).run()
    (tmp_path / "run" / "config.yaml").write_text(made.to_yaml())
    prompts = ["a red ball"]
    assert open_sampler(str(tmp_path / "run"), device="cpu")(prompts, steps=1).shape == (1, 3, 64, 64)
    for teacher_too in (False, True):
        sampler = open_sampler(str(tmp_path / "run"), teacher=teacher_too, device="cpu", size=(32, 96))
        assert sampler(prompts, steps=2).shape == (1, 3, 32, 96)
    with pytest.raises(UserError, match="30x96: sides should be multiples of 8"):
        open_sampler(str(tmp_path / "run"), device="cpu", size=(30, 96))


def test_a_dry_run_is_of_the_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Size, ...]] = []

    def account(config: Config, prompts: int, rollouts: int, sizes: tuple[Size, ...]) -> str:
        asked.append(config.resolution)
        return dryrun._of_sizes(sizes)

    monkeypatch.setattr(dryrun, "account", account)
    said = []
    monkeypatch.setattr(dryrun, "print", lambda text, **options: said.append(text), raising=False)
    for sizes in (BUCKETS[::-1], 32):
        dryrun.dry_run(config(tmp_path, resolution=sizes), "cpu")
    assert asked == [((64, 64),), ((32, 32),)]
    assert said[0].startswith("64 x 64 px, the largest of 3 sizes") and said[1] == "32 x 32 px"


def test_a_damaged_black_latent_names_its_size(teacher: Path, tmp_path: Path) -> None:
    black = build_black_latents(of(teacher, tmp_path), CPU)
    (file,) = (tmp_path / "run").glob("black_latent-*.safetensors")
    from safetensors.torch import save_file

    save_file({"64": black[64, 64], "48x80": torch.zeros(4, 8, 8), "80x48": black[80, 48]}, file)
    with pytest.raises(UserError, match=r"\[4, 8, 8\] in torch\.float32 should be \[4, 6, 10\]"):
        build_black_latents(of(teacher, tmp_path), CPU)
