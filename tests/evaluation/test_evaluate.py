"""`python -m tbcm.evaluate` as a user meets it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evaluation_files import write_clip, write_inception, write_mjhq
from ranks import on_ranks
from tiny import write_config, write_teacher

from tbcm import evaluate, export, train
from tbcm.evaluation import efficientnet, run
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

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(home)
        monkeypatch.setattr(sys, "argv", ["tbcm.evaluate", *map(str, arguments), "--device", "cpu"])
        code = evaluate.main()
        out, err = capsys.readouterr()
        return code, out, err

    return command


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
        assert row["throughput_decoded"] > 0 and 0 < row["throughput_p20"] <= row["throughput"] <= row["throughput_p80"]
        assert row["latency_decoded"] > 0 and 0 < row["latency_p20"] <= row["latency"] <= row["latency_p80"]
    assert found["floor"]["n"] == 3 and found["source"]["checkpoint"] == "step-00000002"
    assert found["source"]["weights"] == "ema" and found["facts"]["torch"] == torch.__version__
    assert len(list(tmp_path.glob("images/1-step-*/*.png"))) == 5
    assert found["network"].startswith("inception ")
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
        out / "cache",
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


class Judge:
    """Of icons: what it was asked for."""

    prompts = ("solid red heart on white", "outline key")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., dict[str, float]]:
        return lambda *images: self.asked.append(name) or {}

    def __call__(self, images: torch.Tensor) -> dict[str, float]:
        return self.__getattr__("all")(images)


@pytest.mark.parametrize(
    ("metrics", "asked"),
    [
        (["distance", "text"], ["all", "floor", "autoencoder_floor", "text_floor"]),
        (["distance"], ["distances", "floor", "autoencoder_floor"]),
        (["text"], ["text", "text_floor"]),
    ],
)
def test_of_icons_only_what_is_asked_for_is_measured(
    metrics: list[str], asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("load_network", "read"):
        monkeypatch.setattr(run, name, lambda *arguments: None)
    monkeypatch.setattr(run, "IconJudge", Judge)
    candidates: Any = SimpleNamespace(teacher=SimpleNamespace(sampler=None))
    options = Options("icons", tmp_path, tmp_path, [1], images=2)
    measure = run._measure_icons(options, candidates, metrics, torch.device("cpu"))
    measure.of([])
    measure.floor()
    assert measure.of.__closure__ is not None
    (judge,) = (cell.cell_contents for cell in measure.of.__closure__ if isinstance(cell.cell_contents, Judge))
    assert judge.asked == asked and measure.network == ("efficientnet-lite0" if "distance" in metrics else None)


def test_a_source_has_a_report_of_its_own(call: Call, home: Path) -> None:
    arguments = ["run", "--prompts", "prompts.txt", "--metrics", "agreement", "--steps", 1]
    assert call(*arguments)[0] == call(*arguments, "--teacher")[0] == 0
    student, teacher = (report(home / "evaluation" / name)["source"] for name in ("run", "run-teacher"))
    assert student["path"] == teacher["path"] == "run"
    assert student["weights"] == "ema" and teacher["teacher"]
    assert evaluate.default_out("hub/name", teacher=False) == Path("evaluation/name")


def test_missing_packages_are_found_before_anything_is_generated(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    efficientnet.load_network.cache_clear()
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    result = call("icons", "--teacher", "--images", 2, "--metrics", "distance", "--steps", 1, "--out", tmp_path)
    assert_one_line(result, "pip install tbcm[icons]")
    assert not list(tmp_path.rglob("*.png"))


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
    assert_one_line(call("run", *mjhq, "--agree-with", "icons", *out), "[8, 8, 8]", "[4, 8, 8]")
    assert_one_line(call("icons", *out), "--teacher")
    assert_one_line(call("icons", "--teacher", "--images", 4001, *out), "--images 4001", "4000")
    for option, value in (("--steps", 0), ("--steps", 1001), ("--images", 1), ("--batch", 0), ("--seed", -1)):
        assert_one_line(call("run", option, value, *out), f"{option} {value}", "at least")
    assert not list(tmp_path.rglob("*.png"))
