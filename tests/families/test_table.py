"""The table in docs/backbones.md is what its script makes of the suite's networks."""

from __future__ import annotations

from families import table


def test_the_table_is_up_to_date() -> None:
    _, inside, _ = table.written(table.DOCUMENT.read_text(encoding="utf-8"))
    assert inside.splitlines() == table.table().splitlines(), "run python tests/families/table.py"
