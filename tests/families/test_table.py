"""The table in docs/backbones.md is what its script makes of the suite's networks."""

from __future__ import annotations

from families import table
from families.tiny import BUILDERS


def test_the_table_is_up_to_date() -> None:
    """It has every network; three rows are made again."""
    _, inside, _ = table.written(table.DOCUMENT.read_text(encoding="utf-8"))
    rows = {line.split("|")[1].strip(): line for line in inside.splitlines()[len(table.HEADER) :]}
    assert sorted(rows) == sorted(BUILDERS)
    for name in ("dit", "flux", "sd3"):
        assert rows[name] == table.row(name), "run python tests/families/table.py"
