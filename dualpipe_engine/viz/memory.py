"""Memory of schedules side by side: a table (rich) and data for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..schedule.jobs.memory import MemoryRow
from ..schedule.jobs.model_memory import Parts
from ..schedule.orders.registry import STOCK
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
    stock = next((row.fullest.total for row in rows if row.schedule == STOCK and row.ranks), 0)
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
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.reason:
            reasons.setdefault(row.reason, []).append(row.schedule)
    for reason, names in reasons.items():
        notes.append(reason if reason.startswith(names[0]) else f"{', '.join(names)}: {reason}")
    table.caption = Text("\n".join(notes))
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


def parts_table(parts: Parts) -> Table:
    """What one micro-batch keeps on the largest layer, by parts."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text("one micro-batch on the largest layer"), title_justify="left")
    table.add_column("part")
    for names in parts:
        table.add_column(Text("again: " + ", ".join(names) if names else "nothing again"), justify="right")
    for part in parts[()]:
        table.add_row(part, *(gib(left[part]) for left in parts.values()))
    table.add_row("total", *(gib(sum(left.values())) for left in parts.values()), style="bold")
    return table


def parts_data(parts: Parts) -> dict[str, Any]:
    """The same for JSON; empty where nothing is known."""
    found = [{"recompute": list(names), "bytes": left} for names, left in parts.items()]
    return {"layer_activations": found} if found else {}
