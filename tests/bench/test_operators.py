from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from scripts import script
from speed import operators
from speed.timing import Clock
from tbcm_kernels.registry import OPERATORS

CPU = torch.device("cpu")


def test_every_operator_has_its_cases() -> None:
    found = list(operators.cases(list(OPERATORS), ["sana-600m", "flux"], [1024], [15]))
    assert {case.operator.name for case in found} == set(OPERATORS)
    for case in found:
        assert case.model in case.operator.models and case.size.samples == 15
        assert case.size.tokens == {"sana-600m": 1024, "flux": 4096}[case.model]
    directions = {(case.operator.name, case.tangents, case.backward) for case in found}
    assert ("norm_modulate", True, False) in directions and ("norm_modulate", False, True) in directions
    assert ("tangent", False, True) not in directions  # it has no gradient


@pytest.mark.parametrize("name", OPERATORS)
def test_costs_are_at_least_the_tensors_that_go_in_and_come_out(name: str) -> None:
    operator = OPERATORS[name]
    case = operators.Case(operator, operator.models[0], 128, 2, tangents=operator.has_tangents, backward=False)
    arguments = operator.inputs(case.size, torch.float32, CPU, case.tangents)
    cost = operator.cost(*arguments)
    outputs = sum(y.nbytes for y in operators.tensors(operator.reference(*arguments)))
    inputs = sum(x.nbytes for x in operators.tensors(arguments))
    assert outputs < cost.bytes <= 1.5 * (inputs + outputs)
    assert cost.flops > 0


def test_rows_of_a_real_run(tmp_path: Path) -> None:
    done = script(
        "bench/kernels.py", "--device", "cpu", "--operators", "norm_modulate", "--models", "sana-600m",
        "--samples", "2", "--repeats", "3", "--out", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    seen = [(row["variant"], row["direction"], row["way"]) for row in rows]
    assert seen == [
        (variant, direction, way)
        for variant, direction in (("plain", "forward"), ("dual", "forward"), ("plain", "backward"))
        for way in ("eager", "compiled")
    ]
    for row in rows:
        assert row["pixels"] == 128 and row["samples"] == 2
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6)
        assert row["of_copy"] == pytest.approx(row["copy_ms"] / row["median_ms"])
    assert "| norm_modulate | plain | forward | sana-600m | 128 | 2 | eager |" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--samples", "20"], "--samples 20: give 1 to 15 points of a prompt, or a multiple of 15"),
        (["--operators", "attention", "--models", "sana-600m"], "--models sana-600m: attention is of other models"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], says: str) -> None:
    done = script("bench/kernels.py", *arguments, "--device", "cpu")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"error: {says}"]


def test_a_clock_tells_a_long_work_from_a_short_one() -> None:
    clock, x = Clock(CPU, repeats=5), torch.randn(300, 300)
    assert clock(lambda: [x @ x for _ in range(20)]).median > 3 * clock(lambda: x @ x).median
