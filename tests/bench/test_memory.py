from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import memory
import pytest
import torch
from PIL import Image
from speed import arms

from tbcm.config import Config
from tbcm.models.sana import presets

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module", autouse=True)
def each_step_once() -> Iterator[None]:
    """A step is seconds of work, and several tests look at the same."""
    account, known = memory.accounted, {}

    def once(arm: str, config: Config, device: torch.device) -> memory.Row:
        key = arm, config.model_dump_json(), device
        if key not in known:
            known[key] = account(arm, config, device)
        return dict(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "accounted", once)
        patch.setitem(presets.MINILM, "num_hidden_layers", 1)
        yield


def accounted(arm: str, samples: int, method: str = "tbcm") -> memory.Row:
    """A prompt with so many samples, or so many images."""
    return memory.accounted(arm, arms.config("tiny", arm, method, samples, samples + 1, CUDA), CPU)


def test_peak_is_base_and_dynamic_and_grows_with_the_batch() -> None:
    small, large = accounted("published", 3), accounted("published", 9)
    for row in (small, large):
        assert row["peak_gib"] == pytest.approx(row["base_gib"] + row["dynamic_gib"])
        assert row["base_gib"] == pytest.approx(row["weights_gib"] + row["gradients_gib"] + row["optimizer_gib"])
    assert large["base_gib"] == pytest.approx(small["base_gib"], rel=0.02)
    assert large["dynamic_gib"] > 2 * small["dynamic_gib"]


def test_what_is_kept_decides_the_dynamic_memory() -> None:
    keep, some, none = (accounted(arm, 3)["dynamic_gib"] for arm in ("no_recompute", "selective", "text_once"))
    assert none < some < keep
    assert accounted("lean", 9)["dynamic_gib"] < 0.6 * accounted("published", 9)["dynamic_gib"]


def test_it_is_accounted_as_a_gpu_would_keep_it() -> None:
    """The teacher in bf16, of which the published way keeps fp32; it has what the student has but two small heads."""
    half, full = (accounted(arm, 3) for arm in ("half_weights", "text_once"))
    saved = (full["weights_gib"] - half["weights_gib"]) / half["gradients_gib"]
    assert 0.4 < saved < 0.5


def test_scm_keeps_its_autoencoder() -> None:
    assert accounted("no_recompute", 3, "scm")["weights_gib"] > accounted("no_recompute", 3)["weights_gib"]


def test_an_adversary_costs_memory_in_the_step() -> None:
    scm, sprint = (accounted("no_recompute", 3, method) for method in ("scm", "sprint"))
    assert sprint["dynamic_gib"] > scm["dynamic_gib"] and sprint["weights_gib"] == scm["weights_gib"]


def test_rows_and_a_picture(tmp_path: Path) -> None:
    wanted = [("published", "tbcm", 3, 4), ("lean", "tbcm", 6, 4), ("lean", "tbcm", 9, 10)]
    rows = memory.run("tiny", wanted, CPU, tmp_path)
    assert [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()] == rows
    assert all(row["accounted"] for row in rows)
    pytest.importorskip("matplotlib")
    memory.plot(rows, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 500
