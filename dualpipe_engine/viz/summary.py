"""Tables (rich): a plan's ops, a timeline's times per rank, and schedules side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..schedule.op import Op, atoms
from ..schedule.plan import Plan
from ..schedule.search.compare import Row, fastest
from ..schedule.search.job_costs import gib
from ..schedule.timeline import Timeline
from .cells import PALETTE, is_second, style

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

MAX_RANKS = 16  #: a longer `plan_table` shows the first and last ranks only
MAX_OPS = 60  #: and a longer program its first and last ops


def plan_table(plan: Plan) -> Table:
    """The ops of each rank; long plans are shortened, and the caption says how to see all of them."""
    from rich.table import Table

    ranks = plan.placement.num_ranks
    table = Table(title_justify="left", caption_justify="left", show_lines=True)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("ops, first to last")
    hidden = range(0)
    if ranks > MAX_RANKS:
        hidden = range(MAX_RANKS // 2, ranks - MAX_RANKS // 2)
    for rank, program in enumerate(plan.programs):
        if rank not in hidden:
            table.add_row(str(rank), _program_text(program, rank))
        elif rank == hidden[0]:
            table.add_row("...", f"{len(hidden)} more ranks")
    if hidden or any(len(program) > MAX_OPS for program in plan.programs):
        table.caption = f"Shortened: the plan has {plan.num_ops:,} ops; --format csv and --format json print all."
    return table


def schedule_table(
    timeline: Timeline,
    peaks: Sequence[float] | None = None,
    simulated: Timeline | None = None,
    title: str = "",
    unit: str = "s",
) -> Table:
    """Busy and idle time of each rank.

    Args:
        timeline: simulated or measured.
        peaks: most activations alive on each rank, in stage activations.
        simulated: what the simulator says of the same plan; adds its bubble share beside that of `timeline`.
        unit: of the times.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title) if title else None, title_justify="left")
    table.add_column("rank", justify="right")
    for name in ("busy", "bubble"):
        table.add_column(Text(f"{name} [{unit}]" if unit else name), justify="right")
    table.add_column("bubble share", justify="right")
    if simulated:
        table.add_column("simulated share", justify="right")
    if peaks:
        table.add_column("peak activations", justify="right")
    busy, bubble = timeline.busy(), timeline.bubble()
    shares, expected = _shares(timeline), _shares(simulated) if simulated else []

    def row(name: str, rank: int) -> list[str]:
        cells = [name, f"{busy[rank]:.4g}", f"{bubble[rank]:.4g}", f"{shares[rank]:.1%}"]
        cells += [f"{expected[rank]:.1%}"] if expected else []
        return cells + ([f"{peaks[rank]:g}"] if peaks else [])

    for rank in range(timeline.num_ranks):
        table.add_row(*row(str(rank), rank))
    return table


def comparison_table(rows: Sequence[Row], lower_bounds: Mapping[str, float], title: str = "") -> Table:
    """Schedules side by side; `>` marks the fastest.

    Args:
        rows: what `schedule.search.compare.compare` returns.
        lower_bounds: name of a row -> least makespan of any order on that schedule's placement.
        title: printed above.
    """
    from rich.table import Table
    from rich.text import Text

    first = fastest(rows)
    table = Table(title=Text(title) if title else None, title_justify="left", caption_justify="left")
    table.add_column("schedule", no_wrap=True)
    names = ["makespan", "lower bound", "bubble", "peak activations", "parameters"]
    known = any(row.memory is not None for row in rows)  # from a job that was measured
    names += ["reduction", "step", "memory"] if known else []
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        numbers = ["-"] * 4
        job = ["-"] * 3 if known else []
        if row.feasible:
            values = (row.makespan, lower_bounds[row.name], row.bubble, row.peak_activations)
            numbers = [f"{value:.6g}" for value in values]
            job = [f"{row.reduction:.4g}", f"{row.total:.6g}", gib(row.memory or 0)] if known else []
        mark, look = (">", "bold green") if row is first else (" ", "" if row.feasible else "dim")
        table.add_row(f"{mark} {row.name}", *numbers, f"{row.parameter_copies}x", *job, style=look)
    notes = ["> fastest", "bubble: of the idlest rank", "peak activations: of 1/N of the model, on N ranks"]
    if known:
        notes += ["step: makespan and reduction of gradients", "memory: beside the weights that are there already"]
    reasons = [row.reason for row in rows if not row.feasible]
    table.caption = Text("\n".join(["; ".join(notes), *reasons]))
    return table


def _shares(timeline: Timeline) -> list[float]:
    makespan = timeline.makespan
    return [bubble / makespan if makespan else 0.0 for bubble in timeline.bubble()]


def _program_text(program: Sequence[Op], rank: int) -> Text:
    from rich.text import Text

    half = MAX_OPS // 2
    short = len(program) > MAX_OPS
    text = Text(" ").join(_op_text(op, rank) for op in (program[:half] if short else program))
    if short:
        text.append(f" ... {len(program) - 2 * half:,} more ops ... ")
        text.append_text(Text(" ").join(_op_text(op, rank) for op in program[-half:]))
    return text


def _op_text(op: Op, rank: int) -> Text:
    from rich.text import Text

    if not op.parts:
        return Text(str(op), style=style(op.kind, is_second(op, rank)) if op.kind in PALETTE else "dim")
    forward, backward = (Text(str(part), style=style(part.kind, is_second(part, rank))) for part in atoms(op))
    return Text.assemble("(", forward, ";", backward, ")FB")
