"""What a balanced cut of the layers gains: every schedule with equal layer counts and re-cut, as table and as data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ..schedule.cuts.fastest import Cut, CutRow

if TYPE_CHECKING:
    from rich.table import Table


def cut_table(rows: Sequence[CutRow], title: str = "") -> Table:
    """Makespans with both cuts; `>` marks the fastest.

    Args:
        rows: what `schedule.cuts.fastest.compare_cuts` returns.
        title: printed above.
    """
    from rich.table import Table
    from rich.text import Text

    first = _fastest(rows)
    table = Table(title=Text(title) if title else None, title_justify="left", caption_justify="left")
    table.add_column("schedule", no_wrap=True)
    for name in ("equal counts", "pairs", "saved"):
        table.add_column(name, justify="right")
    table.add_column("layers of each stage, pairs")
    for row in rows:
        mark, look = (">", "bold green") if row is first else (" ", "" if row.best else "dim")
        cells = ["-"] * 4
        if row.equal and row.best:
            layers = _shortened(row.best.layers)
            cells = [f"{row.equal.makespan:.6g}", f"{row.best.makespan:.6g}", f"{row.saved:.1%}", layers]
        table.add_row(f"{mark} {row.schedule}", *cells, style=look)
    notes = ["> fastest; equal counts of layers in all stages; pairs: ranks balanced, the fastest of some cuts"]
    notes += [row.reason for row in rows if row.reason]
    table.caption = Text("\n".join(notes))
    return table


def cut_data(rows: Sequence[CutRow]) -> list[dict[str, Any]]:
    """The same for JSON: bounds b of a cut say that stage s has layers b[s] to b[s+1] - 1."""
    first = _fastest(rows)
    return [
        {
            "schedule": row.schedule,
            "feasible": row.best is not None,
            "reason": row.reason,
            "equal_counts": _cut_data(row.equal),
            "pairs": _cut_data(row.best),
            "saved": row.saved if row.best else None,
            "fastest": row is first,
        }
        for row in rows
    ]


def _cut_data(cut: Cut | None) -> dict[str, Any] | None:
    return {"makespan": cut.makespan, "bounds": list(cut.bounds)} if cut else None


def _fastest(rows: Sequence[CutRow]) -> CutRow | None:
    makespans = {row.best.makespan: row for row in reversed(rows) if row.best}
    return makespans[min(makespans)] if makespans else None


def _shortened(counts: Sequence[int]) -> str:
    """3, 4 and 4 as "3 4x2"."""
    runs = [(count, len(list(same))) for count, same in groupby(counts)]
    return " ".join(f"{count}x{times}" if times > 1 else str(count) for count, times in runs)
