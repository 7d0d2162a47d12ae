"""Memory of schedules side by side: a table (rich) and data for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..schedule.jobs.memory import STOCK, Memory, MemoryRow
from ..schedule.search.job_costs import gib

if TYPE_CHECKING:
    from rich.table import Table

KINDS = ("weights", "gradients", "optimizer", "activations")


def memory_table(rows: Sequence[MemoryRow], title: str = "") -> Table:
    """The fullest rank of each schedule, and its total as a multiple of stock 1F1B's."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title) if title else None, title_justify="left", caption_justify="left")
    table.add_column("schedule", no_wrap=True)
    host = any(row.ranks and row.fullest.host for row in rows)
    for kind in (*KINDS, "total", "of stock", *(["on the host"] if host else [])):
        table.add_column(kind, justify="right")
    stock = _stock(rows).total
    for row in rows:
        if not row.ranks:
            table.add_row(row.schedule, *["-"] * (6 + host), style="dim")
            continue
        fullest = row.fullest
        share = f"{fullest.total / stock:.2f}x" if stock else "-"
        sizes = [gib(getattr(fullest, kind)) for kind in KINDS]
        there = [gib(fullest.host)] if host else []
        table.add_row(row.schedule, *sizes, gib(fullest.total), share, *there)
    notes = ["on the fullest rank; activations: at the peak of the schedule's reference order"]
    table.caption = Text("\n".join(notes + [row.reason for row in rows if row.reason]))
    return table


def memory_data(rows: Sequence[MemoryRow]) -> list[dict[str, Any]]:
    """Bytes of every rank of each schedule."""
    return [
        {
            "schedule": row.schedule,
            "feasible": bool(row.ranks),
            "reason": row.reason,
            "ranks": [asdict(memory) | {"total": memory.total} for memory in row.ranks],
        }
        for row in rows
    ]


def _stock(rows: Sequence[MemoryRow]) -> Memory:
    return next(row for row in rows if row.schedule == STOCK).fullest
