"""Tables on narrow terminals: every name and number is there, however little room there is."""

import io

import pytest
from rich.table import Table

from dualpipe_engine.viz.console import WholeTables


def shown(width, *cells):
    table = Table()
    table.add_column("schedule", no_wrap=True)
    table.add_column("memory of the fullest", justify="right")
    table.add_column("tokens/s", justify="right")
    table.add_column("change")
    table.add_row(*cells)
    out = io.StringIO()
    WholeTables(file=out, width=width, force_terminal=True, color_system=None).print(table)
    return out.getvalue()


@pytest.mark.parametrize("width", [1, 20, 40, 50, 60, 80, 120])
def test_no_digit_is_lost(width):
    text = shown(width, "interleaved x2", "196.9 GB", "2,437,131", "norms again")
    assert "…" not in text and "interleaved x2" in text
    assert all(word in text for word in ("196.9", "GB", "2,437,131", "norms", "again", "fullest", "tokens/s"))


def test_tables_come_closer_before_lines_break():
    cells = ("interleaved x2", "196.9 GB", "2,437,131", "norms again")
    roomy = shown(80, *cells).splitlines()
    assert " interleaved x2 " in roomy[3] and len(roomy) == 5
    assert " interleaved x2 " in shown(54, *cells) and shown(54, *cells).count("norms") == 1, "prose breaks first"
    for width, cell in ((42, "│196.9 GB│"), (41, "│  196.9│")):
        lines = shown(width, *cells).splitlines()
        assert max(map(len, lines)) <= width and any(f"interleaved x2{cell}" in line for line in lines), lines
