"""Tables (rich): where the time of a profile went, and the findings of the doctor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..schedule.search.job_costs import gib
from ..viz.terminal import wide_console
from .breakdown import CATEGORIES, COMMUNICATION, REDUCING
from .doctor import Finding
from .profile import Profile

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_NAMES = {COMMUNICATION: "comm exposed", REDUCING: "reduction exposed", "FB": "F&B"}


def print_summary(profile: Profile, console: Console | None = None) -> None:
    """Print the times of each rank, and the bubble beside the simulated one."""
    console = console or wide_console()
    console.print(summary_table(profile))
    simulated = profile.simulated()
    first = [rank for rank in profile.ranks if rank.replica == 0]
    measured = max(rank.bubble for rank in first)
    console.print(
        f"largest bubble {measured * 1e3:.1f} ms of {profile.makespan * 1e3:.1f} ms "
        f"({_share(measured, profile.makespan)}), simulated with the measured costs "
        f"{max(simulated.bubble()) * 1e3:.1f} ms of {simulated.makespan * 1e3:.1f} ms "
        f"({_share(max(simulated.bubble()), simulated.makespan)})",
        highlight=False,
        markup=False,
    )


def summary_table(profile: Profile) -> Table:
    """One column a rank, one row for what its step divides into; milliseconds."""
    from rich.table import Table

    simulated = profile.simulated().bubble()
    plan = profile.plan
    title = f"{plan.schedule}, {plan.num_micro} micro-batches; ms of a step, mean of {len(profile.steps)}"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("", no_wrap=True)
    for rank in profile.ranks:
        table.add_column(f"{rank.replica}:{rank.rank}" if rank.replica else f"rank {rank.rank}", justify="right")
    used = [name for name in CATEGORIES if any(rank.seconds.get(name) for rank in profile.ranks)]
    for name in used:
        table.add_row(_NAMES.get(name, name), *(_ms(rank.seconds.get(name, 0.0)) for rank in profile.ranks))
    table.add_row("step", *(_ms(rank.step) for rank in profile.ranks), style="bold", end_section=True)
    for name in (COMMUNICATION, REDUCING):
        table.add_row(f"{name} hidden", *(_ms(rank.hidden.get(name, 0.0)) for rank in profile.ranks))
    table.add_row("bubble", *(_ms(rank.bubble) for rank in profile.ranks))
    table.add_row("bubble simulated", *(_ms(simulated[rank.rank]) for rank in profile.ranks))
    table.add_row("peak memory", *(gib(rank.memory_bytes) for rank in profile.ranks))
    return table


def print_findings(profile: Profile, findings: Sequence[Finding], console: Console | None = None) -> None:
    """Print what the doctor found, in plain words."""
    console = console or wide_console()
    step = profile.step
    lines = [f"{profile.plan.schedule}: {step * 1e3:.1f} ms a step, {len(profile.ranks)} ranks"]
    if not findings:
        lines.append("Nothing stands out: no finding costs enough to act on.")
    for number, finding in enumerate(findings, 1):
        gain = "not known"
        if finding.gain is not None:
            gain = f"{finding.gain * 1e3:.1f} ms a step ({finding.gain / step:.0%})"
            if finding.gain < 0:
                gain = f"memory, for {-finding.gain * 1e3:.1f} ms a step ({-finding.gain / step:.0%})"
        lines += ["", f"{number}. {finding.name}: {finding.fact}", f"   {finding.advice}", f"   expected gain: {gain}"]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "0%"
