"""Every figure as its user meets it: made from a tiny run, looked at as files, and with bad input."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tbcm import figures
from tbcm.errors import UserError
from tbcm.figures import __main__ as command_line
from tbcm.figures import noise_distribution, style, x0_by_route
from tbcm.figures.equivalent_noise import compute
from tbcm.figures.fid_throughput import read_reports
from tbcm.figures.subject import Request, Subject, spread_over

WORDS = {
    "equivalent-noise": ["Eq. 8", "1.000"],
    "noise-distribution": ["t-SNE", "1.000", "perplexity 5)", "7 nearest neighbours"],
    "routes": ["20,000", "reference"],
    "x0-by-route": ["flow Euler 0", "random 0", "against 6 flow-Euler steps"],
    "x0-by-steps": ["3, 4 points", "against 6 flow-Euler steps"],
    "brightness": ["mse_b", "Threshold 1"],
    "samples": ["student in 1 step", "teacher in 20 steps"],
}
STEPS = {"noise-distribution": ["5"], "x0-by-steps": ["3", "4"], "samples": ["1", "2"]}


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def invoke(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tbcm.figures", *map(str, arguments), "--device", "cpu"])
        code = command_line.main()
        out, err = capsys.readouterr()
        return code, out, err

    return invoke


def assert_drawn(out: Path, name: str, printed: str) -> dict[str, Any]:
    """Files, page width, something on the page, nothing cut off at its sides, numbers and caption."""
    with Image.open(out / f"{name}.png") as picture:
        assert picture.width == style.WIDTH and picture.height > 300
        grey = np.asarray(picture.convert("L"))
    assert grey.std() > 5 and grey.min() < 100
    assert grey[:, :2].min() > 250 and grey[:, -2:].min() > 250 and grey[:2].min() > 250 and grey[-2:].min() > 250
    assert "<svg" in (out / f"{name}.svg").read_text(encoding="utf-8")[:1000]
    numbers: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    assert numbers["caption"] in printed and numbers["caption"] in (out / f"{name}.md").read_text(encoding="utf-8")
    assert {path.suffix for path in out.iterdir()} == {".png", ".svg", ".json", ".md"}
    return numbers


@pytest.mark.parametrize("name", WORDS)
def test_figures_of_a_run(call: Any, run: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(x0_by_route, "EXACT_STEPS", 6)
    prompts = 11 if name == "noise-distribution" else 3
    code, out, err = call(name, run, "--prompts", prompts, "--steps", *STEPS.get(name, ["4"]), "--out", tmp_path)
    assert code == 0, err
    numbers = assert_drawn(tmp_path, name, out)
    assert all(word in numbers["caption"] for word in WORDS[name]), numbers["caption"]
    assert numbers.get("exact_steps", 6) == 6 and numbers.get("guidance", 3.0) == 3.0


def test_noise_is_computed_a_few_prompts_at_a_time_and_only_what_is_drawn_kept(run: Path) -> None:
    subject = Subject(Request((str(run),), prompts=5, device="cpu"), 5)
    t = subject.schedule(4)
    whole = compute(subject, t, {i: range(4) for i in range(5)})
    subject.sampler.batch = 2
    parts = compute(subject, t, {1: [0, 3], 4: [2]})
    for name in ("forward", "backward", "predicted"):
        torch.testing.assert_close(getattr(parts.curves, name), getattr(whole.curves, name))
    torch.testing.assert_close(parts.x0, whole.x0)
    for ours, all_of_it in ((parts.forward, whole.forward), (parts.backward, whole.backward)):
        assert ours.keys() == {1, 4}
        torch.testing.assert_close(ours[1], all_of_it[1][[0, 3]], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours[4], all_of_it[4][[2]], rtol=1e-4, atol=1e-5)
    z = subject.noise[4] / subject.sigma_data
    torch.testing.assert_close(whole.forward[4], z.double().expand(4, -1, -1, -1), rtol=1e-4, atol=1e-5)


def test_every_name_is_tested_and_has_a_module() -> None:
    assert set(WORDS) | {"fid-throughput"} == set(figures.FIGURES)


def report(path: Path, **head: Any) -> Path:
    rows = [{"steps": n, "fid": 10.0 / n, "kid": 3.0, "throughput": 8.0 / n, "latency": 1.0} for n in (1, 2)]
    path.write_text(json.dumps({"results": rows, "floor": {}, **head}))
    return path


def test_fid_against_throughput(call: Any, tmp_path: Path) -> None:
    one = report(tmp_path / "one.json", source={"path": "runs/a"})
    two = report(tmp_path / "two.json", source={"path": "runs/a"}, options={"teacher": True})
    code, out, _ = call("fid-throughput", one, two, "--out", tmp_path / "out")
    assert code == 0
    numbers = assert_drawn(tmp_path / "out", "fid-throughput", out)
    assert numbers["measure"] == "fid" and numbers["points"][1] == {
        "label": "runs/a", "steps": 2, "throughput": 4.0, "quality": 5.0
    }  # fmt: skip
    assert {point["label"] for point in numbers["points"]} == {"runs/a", "runs/a, teacher"}


ALIKE = {"images": 9, "prompts": "aa", "network": "n", "reference": "r", "options": {"batch": 4}}
ALIKE |= {"facts": {"device": "cpu (x)"}}


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ({"images": 8}, "images (9 and 8)"),
        ({"prompts": "bb"}, "prompts (aa and bb)"),
        ({"network": "m"}, "network (n and m)"),
        ({"reference": "s"}, "reference (r and s)"),
        ({"options": {"batch": 5}}, "batch (4 and 5)"),
        ({"facts": {"device": "cuda"}}, "device (cpu (x) and cuda)"),
    ],
)
def test_reports_that_cannot_share_an_axis(tmp_path: Path, head: dict[str, Any], words: str) -> None:
    one, same, silent, other = (
        str(report(tmp_path / name, **said))
        for name, said in (("one", ALIKE), ("same", ALIKE), ("silent", {}), ("other", {**ALIKE, **head}))
    )
    assert len(read_reports([one, same, silent])[1]) == 6
    with pytest.raises(UserError, match=re.escape(f"{one} and {other} differ in {words}")):
        read_reports([one, same, silent, other])


def test_reports_of_other_shapes(tmp_path: Path) -> None:
    (tmp_path / "arm").mkdir()
    (tmp_path / "arm" / "report.json").write_text(json.dumps({"steps": 1, "kid": 2.5, "throughput": 3, "label": "b"}))
    rows = [{"steps": 4, "kid": 1.0, "throughput": 1, "label": "c"}, {"steps": 8, "kid": 1.0}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    measure, points = read_reports([str(tmp_path / "arm"), str(tmp_path / "list.json")])
    assert measure == "kid" and [(p.label, p.steps, p.quality) for p in points] == [("b", 1, 2.5), ("c", 4, 1.0)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read"),
        ("{", "not a JSON report"),
        ("3", "not a report"),
        ('{"results": [{"steps": 1, "fid": 3.0}]}', "throughput"),
        ('{"results": [{"steps": 1, "fid": NaN, "throughput": 1}]}', "throughput"),
    ],
)
def test_files_that_are_no_report(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        read_reports([str(path)])


def test_bad_input_is_one_line(call: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object) -> str:
        code, _, err = call(*arguments, "--out", tmp_path / "out")
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(lines) == 1, err
        return lines[0]

    assert "no such figure; there are equivalent-noise" in refused("equivalent")
    (tmp_path / "empty").mkdir()
    for name in ("brightness", "samples", "routes"):
        assert "neither a run" in refused(name, tmp_path / "empty")
    assert "nowhere" in refused("brightness", tmp_path / "nowhere")
    assert "--prompts 0" in refused("routes", run, "--prompts", 0)
    assert "--steps 0" in refused("routes", run, "--steps", 0)
    assert "--seed -1: give at least 0" in refused("routes", run, "--seed", -1)
    assert "at least 2 points" in refused("routes", run, "--steps", 1)
    assert "one number" in refused("routes", run, "--steps", 4, 8)
    assert "one run or teacher" in refused("routes", run, run)
    assert "give --prompt-file" in refused("brightness", run.parent / "teacher")
    assert "no such prompt file" in refused("samples", run, "--prompt-file", tmp_path / "none.txt")
    assert "at least 10" in refused("noise-distribution", run, "--prompts", 4)
    assert "give reports" in refused("fid-throughput")
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    monkeypatch.delattr(noise_distribution, "compute")  # the package is looked for before anything is rolled out
    assert "pip install tbcm[figures]" in refused("noise-distribution", run, "--prompts", 12, "--steps", 4)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "tbcm.figures.style")
    monkeypatch.delattr(figures, "style")
    assert "pip install tbcm[figures]" in refused("routes", run)
    assert not (tmp_path / "out").exists()


def test_spread_over_takes_the_ends() -> None:
    assert spread_over([1.5, 1.4, 1.3, 0.7, 0.1], 3) == [0, 3, 4]
    assert spread_over([1.5, 1.4], 7) == [0, 1]
