"""Table (rich): what makes schedules fit into memory, what it costs in seconds and what it saves in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..schedule.search.job_costs import gib
from ..schedule.search.ladder import Rung

if TYPE_CHECKING:
    from rich.table import Table


def fitting_table(rungs: Sequence[Rung], free: int) -> Table:
    """The changes that were tried for schedules that do not fit as they are; `>` marks the cheapest that makes one fit.

    Args:
        rungs: what `schedule.search.ladder.under_memory` returns.
        free: bytes of memory.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{gib(free)} are free: what makes schedules fit"), title_justify="left")
    for name in ("schedule", "change"):
        table.add_column(name)
    for name in ("step", "costs", "memory", "saves", "fits"):
        table.add_column(name, justify="right")
    for rung in rungs:
        if (plain := rung.plain) is None:
            continue
        needs = gib(plain.memory or 0)
        table.add_row(f"  {rung.schedule}", "as it is", f"{plain.total:.6g}", "-", needs, "-", "no", style="dim")
        for each in rung.tried:
            taken = rung.feasible and each.change == rung.change
            memory, saved = each.memory or 0, (plain.memory or 0) - (each.memory or 0)
            table.add_row(
                f"{'>' if taken else ' '} {each.schedule}",
                Text(each.change),
                f"{each.total:.6g}",
                f"{each.total - plain.total:+.4g}",
                gib(memory),
                gib(saved),
                "yes" if memory <= free else "no",
            )
    return table
