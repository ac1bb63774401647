from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import rows
import step
import torch
from scripts import script
from shrunk import shrink
from speed import arms, flops, options
from tbcm_kernels.registry import OPERATORS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_arms_differ_from_what_they_are_based_on_in_one_thing() -> None:
    for name, arm in arms.ARMS.items():
        if arm.based_on and name not in ("fast", "lean", "compiled"):
            here, there = (arms.overrides(arm, CUDA) for arm in (name, arm.based_on))
            changes = sum(here.get(key) != there.get(key) for key in here)
            assert changes + (arms.without(name) != arms.without(arm.based_on)) == 1, name
    published = arms.config("sana-600m", "published", "tbcm", 15, 16, CUDA)
    assert (published.student.tangent, published.student.checkpointing, published.text.once) == (
        "two_pass",
        "full",
        False,
    )
    fast = arms.config("sana-600m", "fast", "tbcm", 15, 16, CUDA)
    assert (fast.student.tangent, fast.student.derivative, fast.student.checkpointing) == ("one_pass", "dual", "none")
    assert fast.text.once and fast.teacher.half_weights and fast.teacher.cuda_graph is True


def test_the_published_way_has_none_of_our_kernels_and_what_follows_them_has_all() -> None:
    assert set(arms.without("published")) == set(arms.without("no_recompute")) == set(OPERATORS)
    assert arms.without("kernels") == arms.without("fast") == arms.without("lean") == arms.without("adamw") == ()
    assert not arms.config("sana-600m", "published", "tbcm", 15, 16, CUDA).optimizer.fused
    assert arms.config("sana-600m", "fast", "tbcm", 15, 16, CUDA).optimizer.fused == "auto"


def test_flops_that_were_counted_are_known_of_this_configuration_alone(tmp_path: Path) -> None:
    config = arms.config("tiny", "fast", "tbcm", 2, 3, CUDA)
    assert flops.known(config, tmp_path / "flops.json") is None
    counted = flops.count_into(config, tmp_path / "flops.json")
    assert counted > 0
    (tmp_path / "flops.json").write_text((tmp_path / "flops.json").read_text().replace(str(counted), "7"))
    same_work = arms.config("tiny", "kernels", "tbcm", 2, 3, CUDA)  # compiled, captured or fused: the same products
    assert flops.known(config, tmp_path / "flops.json") == flops.known(same_work, tmp_path / "flops.json") == 7
    assert flops.known(arms.config("tiny", "lean", "tbcm", 2, 3, CUDA), tmp_path / "flops.json") is None


@pytest.mark.parametrize("arm", ["published", "fast", "lean"])
def test_flops_of_the_steps_of_a_day_on_a_gpu_are_counted_beforehand(arm: str) -> None:
    assert flops.known(arms.config("sana-600m", arm, "tbcm", 15, 16, CUDA))


def test_rows_are_written_as_they_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a time limit loses one arm; on a GPU, where each is measured by itself."""

    def one(model: str, group: list[tuple[str, str]], *_: object) -> list[dict[str, Any]]:
        written = (tmp_path / "step.jsonl").read_text().count("\n") if seen else 0
        seen.append((group, written))
        return [{"arm": group[0][0], "method": "tbcm", "samples_per_s": float(len(seen))}]

    seen: list[Any] = []
    monkeypatch.setattr(step, "_group", one)
    monkeypatch.setattr(step, "matmul_rate", lambda dtype, device: 1.0)
    monkeypatch.setattr(step, "dtype_of", lambda name, device: torch.bfloat16)
    monkeypatch.setattr(step, "freed", lambda device: nullcontext())
    found = step.run("tiny", ["published", "dual", "fast"], ["tbcm"], 1, 4, 2, CUDA, tmp_path)
    assert [written for _, written in seen] == [0, 1, 2]
    assert [row["speedup"] for row in found] == [1.0, 2.0, 3.0]


def test_on_a_cpu_nothing_is_measured_that_does_nothing_there() -> None:
    names = options.arm_names(argparse.Namespace(arms=None), list(arms.ARMS), arms.ON_CUDA_ONLY)
    configs = [arms.overrides(name, CPU) for name in names if name not in ("fast", "lean")]
    assert all(a != b for i, a in enumerate(configs) for b in configs[:i])


@pytest.mark.parametrize(
    ("method", "samples", "prompts"), [("tbcm", 30, 2), ("tbcm", 4, 1), ("scm", 30, 30), ("sprint", 30, 30)]
)
def test_samples_are_those_that_are_optimised(method: str, samples: int, prompts: int) -> None:
    config = arms.config("tiny", "published", method, samples, 16, CPU)
    assert config.train.prompts_per_step == prompts
    assert prompts * (config.method.route.points - 1 if method == "tbcm" else 1) == samples
    with pytest.raises(ValueError, match="no whole number of prompts"):
        arms.config("tiny", "published", "tbcm", 16, 16, CPU)


def test_rows_and_table_of_a_real_run(tmp_path: Path) -> None:
    arguments = ["--model", "tiny", "--prompts", "1", "--points", "4", "--steps", "2", "--out", str(tmp_path)]
    done = script("bench/step.py", *arguments, "--arms", "published", "text_once", after=shrink)
    assert done.returncode == 0, done.stderr
    others = script("bench/step.py", *arguments, "--arms", "published", "--methods", "scm", "sprint", after=shrink)
    assert others.returncode == 0, others.stderr
    rows = [json.loads(line) for line in (tmp_path / "step.jsonl").read_text().splitlines()]
    assert [(row["arm"], row["method"]) for row in rows] == [
        ("published", "tbcm"),
        ("text_once", "tbcm"),
        ("published", "scm"),
        ("published", "sprint"),
    ]
    for row in rows:
        assert row["samples"] == 3 and row["steps"] == 2 and row["commit"]
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["samples_per_s"] == pytest.approx(3000 / row["median_ms"])
        assert ("vae_ms" in row) == (row["method"] != "tbcm")
        assert ("discriminator_ms" in row) == (row["method"] == "sprint")
        assert row["forward_ms"] > 0 and row["of_matmul"] > 0
    published, ours = rows[0], rows[1]
    assert ours["tflop"] < published["tflop"]
    assert published["speedup"] == 1.0
    assert "| text_once | a prompt's keys and values once | tbcm | 3 |" in done.stdout


def test_an_arm_that_does_not_fit_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(flops, "count", too_large)
    (row,) = step.run("tiny", ["published"], ["tbcm"], 1, 4, 2, CPU, tmp_path)
    assert row["note"] == "out of memory"
    assert "out of memory" in rows.table([row], step.COLUMNS)


def test_bad_arguments_are_one_line() -> None:
    done = script("bench/step.py", "--points", "1")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: --prompts should be at least 1, --points and --steps at least 2"]
    done = script("bench/memory.py", "--device", "cpu", "--arms", "fast", "overlap")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: --arms overlap: on a CPU it changes nothing; leave it out or run on a GPU"
    ]
