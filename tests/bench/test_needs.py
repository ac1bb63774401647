"""What configurations need: the committed table and the configurations' own lines, and how they are written."""

from __future__ import annotations

from pathlib import Path

import needs
import pytest

ONE = needs.Needs("1024", 64_000_000, 3 * 2**30, 2**30, 5 * 2**30, 4 * 10**15, 480)


def test_the_rows_of_the_document_say_what_the_configurations_own_lines_say() -> None:
    rows = needs.DOCUMENT.read_text().split(needs.BEGIN)[1].split(needs.END)[0].strip().split("\n")
    assert rows[:2] == needs.HEADER and len(rows) > 2
    by_name = {row.split(" | ")[0].strip("| `"): row for row in rows[2:]}
    texts = {name: (needs.ROOT / "configs" / f"{name}.yaml").read_text().split("\n") for name in needs.CONFIGS}
    lines = {name: [line for line in text if line.startswith(needs.LINE)] for name, text in texts.items()}
    assert [*by_name] == [name for name, found in lines.items() if found]
    for name, row in by_name.items():
        *_, peak, step = row.strip("| ").split(" | ")
        (line,) = lines[name]
        flops, samples = step.removesuffix(" samples").split(", ")
        assert f"{peak} at the peak and {flops} a step of {samples} samples on one GPU" in line


def test_a_row_and_a_line_take_the_place_of_the_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    document, config = tmp_path / "d.md", tmp_path / "configs" / "sd35.yaml"
    monkeypatch.setattr(needs, "ROOT", tmp_path)
    monkeypatch.setattr(needs, "DOCUMENT", document)
    document.write_text(f"a\n{needs.BEGIN}\n| `pixart` | 1 |\n| `sd35` | 2 |\n{needs.END}\nb")
    config.write_text(f"# a\n{needs.LINE} nothing.\nx: 1\n# b\n")
    for _ in range(2):
        needs.write_table({"sd35": ONE})
        needs.write_line("sd35", ONE)
    row = "| `sd35` | 1024 | 64 | 3.0 GiB | 1.0 GiB | 5.0 GiB | 4 PFLOP, 480 samples |"
    middle = "\n".join([*needs.HEADER, row, "| `pixart` | 1 |"])
    assert document.read_text() == f"a\n{needs.BEGIN}\n{middle}\n{needs.END}\nb"
    assert config.read_text() == f"# a\n{ONE.line}\nx: 1\n# b\n"
