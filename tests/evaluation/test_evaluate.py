"""`python -m tbcm.evaluate` as a user meets it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_files import write_clip, write_inception, write_mjhq
from ranks import on_ranks
from tiny import write_config, write_teacher

from tbcm import evaluate, export, train
from tbcm.evaluation.run import Options
from tbcm.evaluation.run import evaluate as evaluate_options

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, its exported pipeline, prompts, MJHQ in miniature, Inception and CLIP."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "prompts.txt").write_text("a red ball\na blue ball\na green box\n")
    teacher = write_teacher(folder / "teacher")
    steps = {"steps": 2, "prompts_per_step": 2}
    write_config(folder / "c.yaml", teacher, folder / "prompts.txt", folder / "run", train=steps)
    with pytest.MonkeyPatch.context() as patch:
        for main, arguments in ((train.main, ["c.yaml"]), (export.main, ["run", "exported"])):
            patch.setattr(sys, "argv", ["tbcm", *(str(folder / name) for name in arguments)])
            assert main() == 0
    write_mjhq(folder / "mjhq")
    write_inception(folder / "inception.pt")
    write_clip(folder / "clip")
    return folder


@pytest.fixture
def call(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the command in `home`: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(home)
        monkeypatch.setattr(sys, "argv", ["tbcm.evaluate", *map(str, arguments), "--device", "cpu"])
        code = evaluate.main()
        out, err = capsys.readouterr()
        return code, out, err

    return run


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1, err
    assert all(word in lines[0] for word in words), lines[0]


def test_a_run_against_images_in_mjhqs_layout(call: Call, tmp_path: Path) -> None:
    networks = ["--inception", "inception.pt", "--clip", "clip"]
    code, out, err = call(
        "run", "--reference", "mjhq", *networks, "--steps", 1, 2, "--batch", 2, "--images", 5, "--out", tmp_path
    )
    assert code == 0, err
    found = report(tmp_path)
    assert found["metrics"] == ["distance", "text", "agreement", "speed"] and found["images"] == 5
    assert [row["steps"] for row in found["results"]] == [1, 2]
    for row in found["results"]:
        assert set(row) - {"steps"} <= set(found["units"]), "every value says what it is"
        assert row["fid"] > 0 and row["agreement_error"] > 0 and 0 <= row["clip_score"] <= 100
        assert all(row[name] > 0 for name in ("throughput", "throughput_decoded", "latency", "latency_decoded"))
    assert found["floor"]["n"] == 3 and found["source"]["checkpoint"] == "step-00000002"
    assert found["source"]["weights"] == "ema" and found["facts"]["torch"] == torch.__version__
    assert len(list(tmp_path.glob("images/1-step-*/*.png"))) == 5
    assert "clip_score" in out and "report.json" in out


def test_the_same_command_again_makes_nothing_again(call: Call, tmp_path: Path) -> None:
    arguments = ["run", "--reference", "mjhq", "--inception", "inception.pt", "--metrics", "distance", "agreement"]
    assert call(*arguments, "--out", tmp_path)[0] == 0
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.png")}
    before = report(tmp_path)
    assert call(*arguments, "--out", tmp_path)[0] == 0
    assert len(times) == 6 and all(file.stat().st_mtime_ns == time for file, time in times.items())
    assert report(tmp_path)["results"] == before["results"]


def test_a_teacher_at_its_own_steps_agrees_with_itself(call: Call, tmp_path: Path) -> None:
    arguments = ["run", "--teacher", "--prompts", "prompts.txt", "--metrics", "agreement", "--out", tmp_path]
    assert call(*arguments, "--steps", 20, 3)[0] == 0
    full, few = report(tmp_path)["results"]
    assert full["agreement_error"] == full["agreement_spread"] == 0 and full["agreement_n"] == 3
    assert few["agreement_error"] > 0


def test_an_exported_pipeline_has_the_values_of_its_run(call: Call, tmp_path: Path) -> None:
    common = ["--prompts", "prompts.txt", "--metrics", "agreement", "--steps", 2]
    assert call("run", *common, "--out", tmp_path / "run")[0] == 0
    assert_one_line(call("exported", *common, "--out", tmp_path / "exported"), "--agree-with TEACHER")
    (error,) = (row["agreement_error"] for row in report(tmp_path / "run")["results"])
    assert call("exported", *common, "--agree-with", "run", "--out", tmp_path / "exported")[0] == 0
    (again,) = (row["agreement_error"] for row in report(tmp_path / "exported")["results"])
    assert again == pytest.approx(error, rel=0.05)  # its weights are rounded to bf16


def on_a_rank(home: Path, out: Path) -> None:
    options = Options(
        str(home / "run"),
        out,
        [2],
        reference=home / "mjhq",
        inception=str(home / "inception.pt"),
        metrics=["distance", "agreement"],
        batch=2,
    )
    (row,) = evaluate_options(options, torch.device("cpu"))["results"]
    (out / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(row))


def test_two_ranks_report_what_one_does(call: Call, home: Path, tmp_path: Path) -> None:
    on_ranks(2, on_a_rank, home, tmp_path / "two")
    rows = [json.loads((tmp_path / "two" / f"{rank}.json").read_text()) for rank in range(2)]
    arguments = ["--reference", "mjhq", "--inception", "inception.pt", "--metrics", "distance", "agreement"]
    assert call("run", *arguments, "--steps", 2, "--batch", 2, "--out", tmp_path / "one")[0] == 0
    assert rows[0] == rows[1] == report(tmp_path / "one")["results"][0]
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).rglob("*.png")} for name in ("one", "two"))
    assert one == two and len(one) == 6


def test_each_missing_thing_is_one_line(call: Call, home: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path]
    mjhq = ["--reference", "mjhq"]
    (tmp_path / "empty").mkdir()
    assert_one_line(call(tmp_path / "empty", *out), "empty", "neither")
    assert_one_line(call("run", *out), "--prompts FILE", "--reference FOLDER")
    assert_one_line(call("run", "--prompts", "no.txt", *out), "no.txt")
    assert_one_line(call("run", "--reference", "no", *out), "no: no such folder")
    assert_one_line(call("run", *mjhq, "--inception", "no.pt", *out), "no.pt", "download")
    assert_one_line(call("run", *mjhq, "--inception", "inception.pt", "--clip", home / "no", *out), "--clip")
    assert_one_line(call("run", "--prompts", "prompts.txt", "--metrics", "distance", *out), "--reference FOLDER")
    assert_one_line(call("teacher", *mjhq, *out), "add --teacher")
    assert_one_line(call("teacher", "--teacher", *mjhq, *out), "text encoder")
    assert_one_line(call("run", *mjhq, "--agree-with", "emoji", *out), "[8, 8, 8]", "[4, 8, 8]")
    assert_one_line(call("emoji", *out), "--teacher")
    assert_one_line(call("emoji", "--teacher", "--images", 2401, *out), "--images 2401", "2400")
    for option, value in (("--steps", 0), ("--steps", 1001), ("--images", 1), ("--batch", 0)):
        assert_one_line(call("run", option, value, *out), f"{option} {value}", "at least")
    assert not list(tmp_path.rglob("*.png"))
