"""The judge of emoji, on a small made-up set of real images: one colour each, which is its caption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import tiny_config, write_teacher
from torch import Tensor

from tbcm.emoji.dataset import write_atlas
from tbcm.evaluation import emoji
from tbcm.evaluation.distances import fid, kid, split
from tbcm.evaluation.emoji import TEACHER_SEED as SEED
from tbcm.evaluation.emoji import EmojiJudge, middle, spread
from tbcm.models.pipeline import Pipeline

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple", "pink", "gray")
COUNT = 4 * len(COLOURS)
CAPTIONS = [f"{COLOURS[i % len(COLOURS)]} {i // len(COLOURS) + 1}, noto" for i in range(COUNT)]


def coarse(images: Tensor, batch_size: int = 64, device: object = "cpu") -> Tensor:
    return F.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


class Teacher:
    """A sampler whose image i is noise of (seed, i)."""

    batch = 7

    def __init__(self, home: Path) -> None:
        self.config, self.pipeline, self.calls = tiny_config(home), Pipeline(str(home / "teacher")), []

    def __call__(self, prompts: list[str], *, steps: int, guidance: float, seed: int, first: int) -> Tensor:
        self.calls.append((len(prompts), steps, guidance, seed, first))
        return torch.stack([noise(seed, first + i) for i in range(len(prompts))])


def noise(seed: int, image: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + image)
    return torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_teacher(tmp_path / "teacher")
    tiles = [Image.new("RGB", (64, 64), COLOURS[i % len(COLOURS)]) for i in range(COUNT)]
    for i, tile in enumerate(tiles):
        tile.paste(Image.new("RGB", (8, 8), "white"), (i, 40))
    write_atlas(tmp_path / "real.webp", tiles, columns=8)
    rows = [{"caption": caption, "held_out": i % 4 == 3} for i, caption in enumerate(CAPTIONS)]
    (tmp_path / "real.json").write_text(json.dumps({"images": rows}))
    monkeypatch.setattr(emoji, "_ASSETS", tmp_path)
    monkeypatch.setattr(emoji, "features", coarse)
    return tmp_path


def judge(home: Path, images: int = 12, **options: Any) -> tuple[EmojiJudge, Teacher]:
    teacher = Teacher(home)
    return EmojiJudge(teacher, images, **options), teacher  # type: ignore[arg-type]


def real(home: Path) -> Tensor:
    return emoji.read_atlas(home / "real.webp", COUNT)


def test_distances_are_to_real_images_and_to_the_teachers_samples(home: Path) -> None:
    this, teacher = judge(home)
    assert this.prompts == [CAPTIONS[i * COUNT // 12] for i in range(12)]
    images = torch.stack([noise(0, i) for i in range(12)])
    reference, samples = coarse(real(home))[spread(24, COUNT)], coarse(torch.stack([noise(SEED, i) for i in range(12)]))
    expected = {
        "kid": 1e3 * kid(coarse(images), reference),
        "fid": fid(coarse(images), reference),
        "kid_to_teacher": 1e3 * kid(coarse(images), samples),
        "fid_to_teacher": fid(coarse(images), samples),
    }
    unseen = [i for i in range(12) if (i * COUNT // 12) % 4 == 3]
    unseen_real = [k for k, i in enumerate(spread(24, COUNT)) if i % 4 == 3]
    assert len(unseen) >= 2
    expected["kid_heldout"] = 1e3 * kid(coarse(images)[unseen], reference[unseen_real])
    assert this.distances(images) == pytest.approx(expected)
    assert teacher.calls == [(7, 20, 3.0, SEED, 0), (5, 20, 3.0, SEED, 7)]
    floor = this.floor()
    assert floor["n"] == 12 and floor["teacher_kid"] == pytest.approx(1e3 * kid(samples, reference))
    assert floor["kid"] == pytest.approx(1e3 * kid(*split(reference, 12)))


def test_real_images_are_as_good_as_the_floor_and_go_with_their_captions(home: Path) -> None:
    this, _ = judge(home, COUNT)
    found, shuffled = this(real(home)), this(real(home).flip(0))
    assert found["kid"] < 0 and found["fid"] == pytest.approx(0, abs=1e-6)
    assert shuffled["kid"] == pytest.approx(found["kid"]), "a set has no order"
    assert found["text_cosine"] > 0.3 > 0.1 > found["text_cosine_wrong"]
    assert shuffled["text_cosine"] < 0.2
    floor = this.text_floor()
    assert floor["heldout_n"] == COUNT / 4
    assert floor["heldout_text_cosine"] == pytest.approx(found["text_cosine"]), "of held-out captions alone"
    assert floor["heldout_text_cosine"] > floor["heldout_text_cosine_wrong"] + 0.2
    assert floor["teacher_text_cosine"] < found["text_cosine"]


def test_what_is_expensive_is_kept_and_only_for_the_same(home: Path) -> None:
    cache = home / "cache"
    first, teacher = judge(home, cache=cache)
    values = first.floor()
    again, second = judge(home, cache=cache)
    assert again.floor() == values and teacher.calls and not second.calls
    assert torch.equal(again.teacher_images, torch.stack([noise(SEED, i) for i in range(12)]))
    more, third = judge(home, 13, cache=cache)
    more.floor()
    assert third.calls
    weights = home / "teacher" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    trained, fourth = judge(home, cache=cache)
    trained.floor()
    assert fourth.calls


def test_a_teacher_that_is_meant_otherwise_is_asked_again(home: Path) -> None:
    cache = home / "cache"
    judge(home, cache=cache)[0].floor()
    other, teacher = judge(home, cache=cache)
    section = teacher.config.teacher.model_copy(update={"null_mask": "conditional"})
    teacher.config = teacher.config.model_copy(update={"teacher": section})
    other.floor()
    assert teacher.calls


def test_other_numbers_of_images_are_refused(home: Path) -> None:
    this, _ = judge(home)
    with pytest.raises(ValueError, match="11 images for 12 prompts"):
        this(real(home)[:11])
    for images in (1, 2401):
        with pytest.raises(ValueError, match="2 to 2400"):
            judge(home, images)


def test_the_middle_guidance_is_the_samplers_own() -> None:
    assert middle([5.0, 3.0, 4.0]) == 4.0 and middle([4.0]) == 4.0
