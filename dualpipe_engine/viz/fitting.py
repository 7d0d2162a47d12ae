"""Table (rich): what was tried with each schedule, what it costs in seconds and what it saves in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..schedule.jobs.under_memory import Fitted
from ..schedule.search.job_costs import Measurement, gib
from ..schedule.timing.bound import plan_bound

if TYPE_CHECKING:
    from rich.table import Table


def lower_bounds(rows: Sequence[Fitted], job: Measurement) -> dict[str, float]:
    """Name of a row -> the least makespan of any order of its ops, for those with a plan."""
    found = {}
    for row in rows:
        if row.plan is not None:
            costs = job.again(row.recompute).placed(row.plan.placement, row.bounds)
            found[row.name] = plan_bound(row.plan, costs)
    return found


def fitting_table(rows: Sequence[Fitted], free: int | None) -> Table:
    """What was tried with schedules beside themselves as they are; `>` marks what was taken.

    Args:
        rows: what `schedule.jobs.under_memory.under_memory` returns.
        free: bytes of memory; None: unknown.
    """
    from rich.table import Table
    from rich.text import Text

    title = "what was tried" if free is None else f"what was tried; {gib(free)} are free"
    table = Table(title=Text(title), title_justify="left")
    for name in ("schedule", "change"):
        table.add_column(name)
    for name in ("step", "costs", "memory", "saves", "fits"):
        table.add_column(name, justify="right")
    for row in rows:
        if (plain := row.plain) is None:
            continue
        for each in (plain, *row.tried):
            taken = row.feasible and each.change == row.change
            memory, saved = each.memory or 0, (plain.memory or 0) - (each.memory or 0)
            table.add_row(
                f"{'>' if taken else ' '} {each.name}",
                Text("as it is" if each is plain else each.change),
                f"{each.total:.6g}",
                "-" if each is plain else f"{each.total - plain.total:+.4g}",
                gib(memory),
                "-" if each is plain else gib(saved),
                "yes" if free is None or memory <= free else "no",
                style="" if taken else "dim",
            )
    return table


def fitting_data(row: Fitted) -> dict[str, Any]:
    """The change of a row, and what was tried, as JSON with the keys of the "pipeline" section."""
    return {
        "change": row.change,
        "tried": [{"change": each.change, "step": each.total, "memory": each.memory} for each in row.tried],
    }
