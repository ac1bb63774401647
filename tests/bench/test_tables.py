from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tables
import torch
from paper import published, recipes, report, trainings, tuning
from paper.icons import IconRunner
from paper.recipes import ARMS, Arm
from paper.statistics import REPRODUCED, REVERSED
from paper.trainings import Results, Run
from scripts import script

from tbcm.config import load_config
from tbcm.errors import UserError
from tbcm.runtime.lock import RunLock

BUDGET = 9600
CPU = torch.device("cpu")
FLOOR = {"n": 10, "kid": 0.1, "fid": 20.0, "teacher_kid": 100.0, "teacher_fid": 150.0}
FLOOR |= {"teacher_concept": 0.3, "real_concept": 0.4}


class FakeRunner:
    """Counts, and "measures" a number that depends on the arm and a little on the seed."""

    def __init__(self, kid: dict[str, float] | None = None, stop_at: str = "", fail_at: str = "") -> None:
        self.kid, self.stop_at, self.fail_at = kid or {}, stop_at, fail_at
        self.trained: list[str] = []
        self.measured: list[tuple[str, int]] = []
        self.floor = FLOOR

    def train(self, run: Run) -> float:
        if run.name == self.stop_at:
            raise KeyboardInterrupt
        if run.name == self.fail_at:
            raise UserError("loss was not finite")
        self.trained.append(run.name)
        return 60.0

    def measure(self, run: Run, steps: int) -> dict[str, float]:
        self.measured.append((run.name, steps))
        kid = self.kid.get(run.arm.name, 5.0) + 0.1 * run.seed
        same = {"fid": kid, "kid_to_teacher": kid, "fid_to_teacher": kid, "agreement_error": kid, "concept": -kid}
        return {"kid": kid, **same, "evaluate_seconds": 1.0}


def runs_of_tables(*numbers: int, seeds: range = range(2), folder: Path = Path("unused")) -> list[Run]:
    lines = [(line, n) for n in numbers for table in published.TABLES[n] for line in table.lines]
    wanted = [(ARMS[line.arm], line.steps, n) for line, n in lines]
    return trainings.runs_of(wanted, seeds, BUDGET, folder)


def test_arms_that_tables_share_are_one_run() -> None:
    names = {number: {run.name for run in runs_of_tables(number)} for number in published.TABLES}
    together = runs_of_tables(2, 4, 5, 6, 7)
    assert len({run.recipe for run in together}) == 25  # 23 trainings, the teacher, the untrained student
    assert len(together) == 2 * 25 < sum(map(len, names.values()))
    (shared,) = [run for run in together if run.seed == 1 and run.recipe == recipe("tbcm")]
    assert shared.tables == (2, 4, 5, 6, 7) and shared.samplings == (1, 2, 4)
    assert recipe("tbcm") == recipe("points_16") == recipe("route_reference") == recipe("r_1")
    assert [run.seed for run in together] == [0] * 25 + [1] * 25  # a whole seed first: pairs come early


def recipe(arm: str, budget: int = BUDGET) -> str:
    return recipes.recipe(ARMS[arm], recipes.config_of(ARMS[arm], 3, budget, "anywhere"))


def test_a_recipe_is_what_decides_the_result() -> None:
    assert recipe("tbcm") != recipe("tbcm", 4800) != recipe("scm", 4800)
    assert recipe("teacher") == recipe("teacher", 4800) != recipe("untrained")  # no training in it


@pytest.mark.parametrize("budget", [480, 9600, 120_000])
def test_arms_optimise_the_same_number_of_samples(budget: int) -> None:
    arms = {name: arm for name, arm in ARMS.items() if arm.trained and arm.equal == "samples"}
    configs = {name: recipes.config_of(arm, 0, budget) for name, arm in arms.items()}
    for name, config in configs.items():
        a_step = recipes.samples(config) / config.train.steps
        assert abs(a_step - 120) <= (8 if ARMS[name].tuned else 6), name
        assert abs(recipes.samples(config) - budget) <= a_step / 2, name
    assert [configs[f"points_{n}"].train.prompts_per_step for n in (8, 12, 16, 20)] == [17, 11, 8, 6]


def test_tuned_arms_are_the_recipes_and_others_the_published_settings() -> None:
    for name, file in (("tbcm", "icons.yaml"), ("scm", "icons_scm.yaml"), ("sprint", "icons_sprint.yaml")):
        own = load_config(recipes.CONFIGS / file)
        tuned, published = (recipes.config_of(ARMS[arm], 0, BUDGET) for arm in (f"{name}_tuned", name))
        assert (tuned.method, tuned.student) == (
            own.method.model_copy(update={"r": tuned.method.r}),  # whose steps are scaled
            own.student,
        )
        assert tuned.method.r.final == own.method.r.final and tuned.train.prompts_per_step == own.train.prompts_per_step
        assert published.method.r.final == 1.0
        assert published.student.guidance_embeds_scale is None and published.optimizer.cooldown_steps == 0
        assert name == "tbcm" or published.method.times.mean == 0.2
        assert recipes.samples(published) == BUDGET
    route = recipes.config_of(ARMS["tbcm"], 0, BUDGET).method.route
    assert (route.points, route.shift) == (16, 2.5)


def test_arms_of_equal_prompts_have_those_of_sixteen_points() -> None:
    whole = recipes.config_of(ARMS["points_16"], 0, BUDGET)
    for points in (8, 12, 20):
        config = recipes.config_of(ARMS[f"points_{points}_same_prompts"], 0, BUDGET)
        assert config.train == whole.train and config.optimizer == whole.optimizer and config.ema == whole.ema
        assert recipes.samples(config) * 15 == BUDGET * (points - 1)


def test_schedules_keep_their_share_of_the_run() -> None:
    whole = recipes.base_of(ARMS["r_0.5"])
    tenth = recipes.config_of(ARMS["r_0.5"], 0, whole.train.steps * 120 // 10)
    steps = tenth.train.steps
    assert steps == whole.train.steps // 10
    # warm-ups, which are longer in a short run: a half and a fifth of it
    assert (tenth.method.r.warmup_steps, tenth.optimizer.warmup_steps) == (0.5 * steps, 0.2 * steps)
    assert tenth.ema.halflife_steps == pytest.approx(whole.ema.halflife_steps / 10)
    # the paper's 15,000 and 2,000 of 20,000
    assert (tenth.method.r.cooldown_start, tenth.method.r.cooldown_steps) == (0.75 * steps, 0.1 * steps)
    tried = Arm("tried", "", change=("method.r.warmup_steps=250",))
    assert recipes.config_of(tried, 0, whole.train.steps * 120 // 10).method.r.warmup_steps == 0.25 * steps
    straight = recipes.config_of(ARMS["r_0.75_warmup"], 0, BUDGET).method.r
    assert straight.final == 0.75 and straight.cooldown_start is None


def test_finished_runs_are_not_repeated_and_interrupted_ones_are(tmp_path: Path) -> None:
    results, runs = Results("tables", tmp_path / "out", 10, CPU), runs_of_tables(4, folder=tmp_path / "runs")
    first = FakeRunner(stop_at="route_random, seed 1")
    with pytest.raises(KeyboardInterrupt):
        trainings.do(runs, results, first)
    assert first.trained == [run.name for run in runs[:3]]
    second = FakeRunner()
    assert trainings.do(runs, results, second) == []
    assert second.trained == [run.name for run in runs[3:]]
    again = FakeRunner()
    assert trainings.do(runs, results, again) == [] and again.trained == again.measured == []
    # Another number of images is another measurement.
    assert results.missing(runs[0]) == [] and Results("tables", tmp_path / "out", 11, CPU).missing(runs[0]) == [1]
    # What another table asks beyond that is measured of the same runs.
    asked = FakeRunner()
    trainings.do(runs_of_tables(2, 4, folder=tmp_path / "runs"), results, asked)
    shared = next(run for run in runs if run.recipe == recipe("tbcm"))
    assert ("tbcm, seed 0", 2) in asked.measured and ("tbcm, seed 0", 1) not in asked.measured
    rows = results.rows()
    assert {"bench", "table", "row", "seed", "metric", "value", "arm", "model", "gpu", "cpu", "torch"} <= rows[0].keys()
    assert sum(row["metric"] == "kid" and row["recipe"] == shared.recipe for row in rows) == 2 * 3


def test_figures_without_their_last_row_are_not_a_finished_run(tmp_path: Path) -> None:
    results, (run, *_) = Results("tables", tmp_path, 10, CPU), runs_of_tables(4)
    results.add(run, 1, {"kid": 1.0, "evaluate_seconds": 1.0})
    assert results.missing(run) == []
    path = tmp_path / "tables.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert results.missing(run) == [1]
    results.add(run, 1, {"kid": 2.0, "evaluate_seconds": 1.0})
    assert [row["value"] for row in results.rows() if row["metric"] == "kid"] == [2.0]


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Run]:
    """A run that another process is at."""
    run = runs_of_tables(4, folder=tmp_path / "runs")[1]
    folder = Path(run.config.out).parent
    code = f"from tbcm.runtime.lock import RunLock\nwith RunLock({str(folder)!r}):\n  print(flush=True)\n  input()"
    root = Path(recipes.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout
    process.stdout.readline()
    yield run
    process.communicate(b"\n")


def test_a_run_of_another_process_and_one_that_fails_are_left_out(tmp_path: Path, held: Run) -> None:
    runs, runner = runs_of_tables(4, folder=tmp_path / "runs"), FakeRunner(fail_at="route_random, seed 1")
    problems = trainings.do(runs, Results("tables", tmp_path / "out", 10, CPU), runner)
    assert len(problems) == 2
    assert problems[0].startswith(f"{held.name}: ") and "is in use by process" in problems[0]
    assert problems[1] == "route_random, seed 1: loss was not finite"
    assert len(runner.trained) == len(runs) - 2
    with RunLock(Path(runs[0].config.out).parent):  # and nothing stays locked
        pass


@pytest.mark.parametrize(
    ("kid", "decided"),
    [
        ({"route_reference": 3.0, "tbcm": 3.0, "route_logit_normal": 4.0, "route_random": 5.0}, REPRODUCED),
        ({"route_reference": 3.0, "tbcm": 3.0, "route_logit_normal": 6.0, "route_random": 5.0}, REVERSED),
    ],
)
def test_markdown(tmp_path: Path, kid: dict[str, float], decided: str) -> None:
    results, (table,) = Results("tables", tmp_path / "out", 10, CPU), published.TABLES[4]
    runs = runs_of_tables(4, seeds=range(3), folder=tmp_path / "runs")
    trainings.do(runs, results, FakeRunner(kid))
    text = report.markdown(table, report.Figures(results.rows(), BUDGET, range(4)), 10, results.floor(), {})
    # 5, 5.1, 5.2: deviation 0.1, half width 4.303 * 0.1 / sqrt(3)
    assert "| random | 5.10 ± 0.100 [4.85, 5.35], n = 3 |" in text
    assert "| 9,600 |" in text or "| 9600 |" in text
    assert f"The paper's order by FID, by our KID x 1e3: **{decided}**" in text
    assert "Not measured yet: random (seed 3); logit-normal (seed 3); reference route (seed 3)." in text
    assert "10 real images against as many others" in text


def test_a_recipe_that_has_changed_since_is_not_measured_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, (table,) = Results("tables", tmp_path / "out", 10, CPU), published.TABLES[4]
    runs = runs_of_tables(4, seeds=range(2), folder=tmp_path / "runs")
    trainings.do(runs, results, FakeRunner())

    def told() -> str:
        figures = report.Figures(results.rows(), BUDGET, range(2))
        return report.markdown(table, figures, 10, results.floor(), {})

    assert "Not measured yet" not in told() and "| random | 5.05 ±" in told()
    changed = Arm("route_random", "", change=("method.route.kind=random", "optimizer.lr=2e-4"))
    monkeypatch.setitem(ARMS, "route_random", changed)
    text = told()
    assert "Not measured yet: random (seed 0, 1; measured with another recipe)." in text
    assert "| random |" in text and "| random | 5" not in text and "| logit-normal | 5.05 ±" in text
    assert [run.arm.name for run in runs_of_tables(4, seeds=range(2)) if results.missing(run)] == ["route_random"] * 2


def test_the_gap_that_is_closed(tmp_path: Path) -> None:
    results, (table, _) = Results("tables", tmp_path / "out", 10, CPU), published.TABLES[2]
    kid = {"untrained": 70.0, "teacher": 0.0, "tbcm": 7.0}
    trainings.do(runs_of_tables(2, seeds=range(3), folder=tmp_path / "runs"), results, FakeRunner(kid))
    figures = report.Figures(results.rows(), BUDGET, range(3))
    lines = tuple(table.line(label) for label in ("TBCM, 1 step", "untrained student, 1 step", "teacher, 20 steps"))
    share = report.gap_closed(*lines, figures, "kid")
    assert share and share.mean == pytest.approx(0.9) and share.n == 3
    assert report.gap_closed(lines[0], lines[1], lines[1], figures, "kid") is None  # there is no gap
    rows = report.gaps(table, figures, "untrained student, 1 step", "teacher, 20 steps").splitlines()[2:]
    methods = [
        f"{method}, {steps}"
        for method in ("sCM", "Sana-Sprint", "TBCM", "LCM", "PCM")
        for steps in ("1 step", "2 steps", "4 steps")
        if (method, steps) != ("PCM", "2 steps")
    ]
    methods += ["DMD2, 1 step", "DMD2 without adversary, 1 step"]
    assert sorted(row.split(" | ")[0].removeprefix("| ") for row in rows) == sorted(methods)
    assert all("90.0%" in row for row in rows if "TBCM, 1" in row)


def test_all_methods_are_tuned_with_the_same_effort(tmp_path: Path) -> None:
    grids = [tuning.grid(method) for method in tuning.METHODS]
    assert len({tuple(arm.what for arm in grid) for grid in grids}) == 1 and len(grids[0]) == 7
    for grid in grids:
        configs = [recipes.config_of(arm, 0, BUDGET) for arm in grid]
        assert len({recipes.recipe(arm, config) for arm, config in zip(grid, configs, strict=True)}) == 7
        assert all(abs(recipes.samples(config) - BUDGET) <= 120 for config in configs)
        assert configs[2].optimizer.lr == pytest.approx(9 * configs[1].optimizer.lr, rel=1e-2)
        assert configs[3].train.steps == 4 * configs[4].train.steps
    results, arms = (
        Results("tuning", tmp_path / "out", 10, CPU),
        [*grids[0][:2], tuning.attempt("tbcm", ["ema.ramp_up=null"])],
    )
    runs = trainings.runs_of([(arm, 1, None) for arm in arms], [100, 101], BUDGET, tmp_path / "runs")
    trainings.do(runs, results, FakeRunner({"tbcm: lr / 3": 4.0}))
    text = tuning.markdown(results.rows(), "tbcm", 10)
    assert text and tuning.markdown(results.rows(), "scm", 10) is None and results.image_counts() == [10]
    lines = text.splitlines()
    tried = [line.split(" | ")[0].strip("| ") for line in lines if line.startswith("|")][2:]
    assert tried[0] == "lr / 3" and set(tried) == {"lr / 3", "recipe", "ema.ramp_up=null"}


def test_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of one prompt of the icons teacher, measured on four images."""
    pytest.importorskip("efficientnet_lite_pytorch")
    change = ("train.prompts_per_step=1", "method.route.points=4")
    arms = [Arm("quick", "", change=change), ARMS["untrained"]]
    monkeypatch.setattr(IconRunner, "judge", property(lambda self: Judge(self)))
    results = Results("tables", tmp_path / "out", 4, CPU)
    runs = trainings.runs_of([(arm, 1, 4) for arm in arms], [0], 6, tmp_path / "runs")
    runner = IconRunner(runs[0].config, 4, tmp_path / "references", torch.device("cpu"))
    assert trainings.do(runs, results, runner) == []
    assert checkpoint_steps(runs[0]) == [2]
    values = {(row["arm"], row["metric"]): row["value"] for row in results.rows()}
    assert values["quick", "agreement_error"] > 0 and values["quick", "train_seconds"] > 0
    assert values["quick", "kid"] != values["untrained", "kid"]  # it was the trained student that was measured
    (trained,) = [row for row in results.rows() if row["metric"] == "train_seconds"]
    assert trained["samples"] == 6 and trained["training_steps"] == 2
    assert trained["config"]["method"]["route"]["points"] == 4


class Judge:
    """The icons judge without its references, which take minutes."""

    def __init__(self, runner: IconRunner) -> None:
        self.prompts = ["solid red heart on white", "outline key", "solid blue car on gray", "moon icon"]

    def __call__(self, images: torch.Tensor) -> dict[str, float]:
        assert images.shape == (4, 3, 64, 64) and images.dtype == torch.uint8
        return {"kid": images.double().mean().item()}

    def floor(self) -> dict[str, float]:
        return FLOOR

    def text_floor(self) -> dict[str, float]:
        return {}


def checkpoint_steps(run: Run) -> list[int]:
    return [int(path.name[5:]) for path in (Path(run.config.out) / "checkpoints").glob("step-*")]


def test_command_line(tmp_path: Path) -> None:
    results = Results("tables", tmp_path, 2000, CPU)
    runner = FakeRunner({"untrained": 70.0, "teacher": 0.0})
    trainings.do(runs_of_tables(2, 4, 7, seeds=range(2), folder=tmp_path / "runs"), results, runner)
    done = script("bench/tables.py", "--report", "--table", "2", "3", "4", "7", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "### Table 7" in done.stdout and "Not measured yet" in done.stdout
    for title in ("methods", "methods, each as tuned on icons"):
        _, _, table = done.stdout.partition(f"### Table 2: {title}\n")
        assert "| of the gap from" in table.partition("### Table")[0]
    assert (tmp_path / "table-4.md").read_text().strip() in done.stdout
    assert all(json.loads(line)["bench"] == "tables" for line in (tmp_path / "tables.jsonl").read_text().splitlines())


def test_what_was_tried_is_reported_by_number_of_images(tmp_path: Path) -> None:
    for images in (10, 20):
        arms = tuning.grid("scm")[: images // 10]
        runs = trainings.runs_of([(arm, 1, None) for arm in arms], [100], BUDGET, tmp_path / "runs")
        trainings.do(runs, Results("tuning", tmp_path, images, CPU), FakeRunner())
    for method, counts in (("scm", [1, 2]), ("sprint", [])):
        done = script("bench/tables.py", "--report", "--tune", method, "--out", str(tmp_path))
        assert done.returncode == 0, done.stderr
        text = (tmp_path / f"tuning-{method}.md").read_text()
        tables = text.split("| tried |")[1:]
        assert [table.count(f"| {BUDGET} |") for table in tables] == counts
        assert ("Nothing is measured yet." in text) == (not counts)


def test_unknown_arms_are_one_line(tmp_path: Path) -> None:
    arguments = argparse.Namespace(only=["scm"], budget=BUDGET, runs=tmp_path)
    with pytest.raises(UserError, match="--only 'scm': no arm of these; choose from 'route_random'"):
        tables._do(
            [(ARMS["route_random"], 1, 4)], range(1), Results("tables", tmp_path, 10, CPU), arguments, FakeRunner()
        )
