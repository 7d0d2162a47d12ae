"""The memory ladder of a whole job: the rung of each schedule, all rungs of the chosen one, and the reason in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..schedule.cuts.counts import counts_text
from ..schedule.jobs.ladder import Ladder, Outcome, Work, chosen

if TYPE_CHECKING:
    from rich.table import Table


def schedules_table(ladders: Sequence[Ladder], work: Work) -> Table:
    """The cheapest rung that fits of each schedule; `>` marks the fastest."""
    from rich.table import Table

    first = chosen(ladders)
    title = f"{work.model.name} on {work.job.gpus} {work.hardware.name}, {work.memory / 1e9:g} GB each"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("schedule", no_wrap=True)
    for name in ("as it is (s)", "(GB)"):
        table.add_column(name, justify="right")
    table.add_column("cheapest change that makes it fit")
    for name in ("step (s)", "(GB)"):
        table.add_column(name, justify="right")
    notes = []
    for each in ladders:
        if each.reason:
            table.add_row(f"  {schedule_name(each)}", *["-"] * 5, style="dim")
            notes.append(each.reason)
            continue
        plain, found = f"{each.plain.step:.2f}", each.cheapest
        asis = plain, f"{each.plain.memory / 1e9:.1f}"
        if found is None:
            least = each.least
            none = f"none; least: {change(least)}"
            table.add_row(f"  {schedule_name(each)}", *asis, none, f"{least.step:.2f}", _gb(least), style="dim")
            continue
        mark, style = (">", "bold green") if each is first else (" ", "")
        table.add_row(
            f"{mark} {schedule_name(each)}", *asis, change(found), f"{found.step:.2f}", _gb(found), style=style
        )
    table.caption = "\n".join(["memory: of the fullest rank", *notes])
    return table


def rungs_table(ladder: Ladder) -> Table:
    """What each rung costs in seconds and saves in bytes."""
    from rich.table import Table

    plain = ladder.plain
    table = Table(title=f"{schedule_name(ladder)}, every rung", title_justify="left")
    table.add_column("computed again")
    for name in ("backward", "offload", "cut", "step (s)", "costs (s)", "saves (GB)", "memory (GB)"):
        table.add_column(name, justify="right")
    for each in ladder.outcomes:
        table.add_row(
            each.rung.label,
            {True: "split", False: "full", None: "-"}[each.split],
            "-" if each.away is False else "all" if each.away is True else str(each.away),
            "equal work" if each.bounds is None else "fastest",
            f"{each.step:.2f}",
            f"{each.step - plain.step:.2f}",
            f"{(plain.memory - each.memory) / 1e9:.1f}",
            _gb(each),
            style="bold green" if each == ladder.cheapest else "" if each.fits else "dim",
        )
    return table


def cuts(ladder: Ladder) -> list[str]:
    """The key for each cut other than that of equal work, on one line however long it is."""
    others = dict.fromkeys(each.bounds for each in ladder.outcomes if each.bounds is not None)
    return [f'fastest cut: "partition_method": "{counts_text(each)}"' for each in others]


def reason(ladders: Sequence[Ladder], work: Work) -> str:
    """The choice and why, in a sentence."""
    first, limit = chosen(ladders), f"{work.memory / 1e9:g} GB"
    able = [each for each in ladders if not each.reason]
    if first is None or first.cheapest is None:
        if not able:
            return "no schedule runs on these ranks: " + "; ".join(each.reason for each in ladders)
        least = min(able, key=lambda each: each.least.memory)
        return (
            f"nothing fits into {limit}: the least is {schedule_name(least)}, {change(least.least)}, with "
            f"{least.least.memory / 1e9:.1f} GB: take more pipeline ranks, or shorter micro-batches"
        )
    best, plain = first.cheapest, first.plain
    text = f"{schedule_name(first)}, {change(best)}: the shortest step that fits into {limit}, {best.step:.2f} s"
    if best != plain:
        cost = best.step - plain.step
        text += (
            f", which saves {(plain.memory - best.memory) / 1e9:.1f} of {plain.memory / 1e9:.1f} GB "
            f"{'and' if cost < 0 else 'for'} {abs(cost):.2f} s"
        )
    fitting = [(each.cheapest.step, schedule_name(each)) for each in able if each.cheapest]
    rest = [each for each in fitting if each[0] > 1.001 * best.step]  # with full backwards two may be the same
    return text + (f"; next is {min(rest)[1]} with {min(rest)[0]:.2f} s" if rest else "")


def ladder_data(ladders: Sequence[Ladder], work: Work) -> dict[str, Any]:
    """The same as JSON."""
    first = chosen(ladders)
    return {
        "model": work.model.name,
        "job": asdict(work.job),
        "hardware": asdict(work.hardware),
        "memory": work.memory,
        "schedules": [
            {
                "schedule": each.schedule,
                "stages_per_rank": each.stages_per_rank,
                "reason": each.reason,
                "as_it_is": None if each.reason else _data(each.plain),
                "cheapest": None if each.reason or not each.cheapest else _data(each.cheapest),
                "chosen": each is first,
            }
            for each in ladders
        ],
        "rungs": [_data(each) for each in first.outcomes] if first else [],
        "reason": reason(ladders, work),
    }


def change(outcome: Outcome) -> str:
    """What is changed, for people."""
    parts = [] if outcome.rung.label == "-" else [f"{outcome.rung.label} again"]
    parts += ["full backwards"] if outcome.split is False else []
    if outcome.away is not False:
        parts.append(f"offload {'all' if outcome.away is True else outcome.away}")
    parts += [] if outcome.bounds is None else ["another cut"]
    return "; ".join(parts) or "as it is"


def schedule_name(ladder: Ladder) -> str:
    """With the stages of a rank where they were chosen."""
    return ladder.schedule + ("" if ladder.stages_per_rank is None else f" x{ladder.stages_per_rank}")


def _gb(outcome: Outcome) -> str:
    return f"{outcome.memory / 1e9:.1f}" + ("" if outcome.fits else " (too much)")


def _data(outcome: Outcome) -> dict[str, Any]:
    """With the keys of the "pipeline" section."""
    return {
        "recompute": list(outcome.rung.names),
        "activation_checkpoint_interval": int(outcome.rung.whole),
        "split_backward": outcome.split,
        "offload_activations": outcome.away,
        "partition_method": None if outcome.bounds is None else counts_text(outcome.bounds),
        "step": outcome.step,
        "memory": outcome.memory,
        "fits": outcome.fits,
    }
