"""Cells: what every drawing shows of a timeline. Colours, letters, and the reduction to columns of time."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..schedule.op import BESIDE, COMPUTE, FB, REDUCE, STEP, B, F, I, Op, W, atoms
from ..schedule.placement import VEE, Placement
from ..schedule.timeline import Span, Timeline

#: kind -> (meaning, background of the rank's first stage, background of its others)
PALETTE = {
    F: ("forward", "#ffc857", "#dc7a12"),
    B: ("backward", "#7fcb8b", "#2c8a50"),
    I: ("backward for input", "#8ee0d8", "#1a8f94"),
    W: ("backward for weights", "#a3c4f3", "#3f6fc4"),
    REDUCE: ("gradient reduction", "#cdb4e6", "#8457b5"),
    STEP: ("optimizer step", "#b8b8c0", "#6f6f78"),
}
INK = ("#20242a", "#ffffff")  #: text on the first and on the second background
PAIR_SHARE = 1 / 3  #: part of an overlapped pair that is drawn as forward, as in the paper; both in fact run throughout


class Cell(NamedTuple):
    """A coloured box: `second` says that the rank runs it for another than its first stage."""

    rank: int
    kind: str
    second: bool
    micro: int
    start: float
    end: float


def is_second(op: Op, rank: int) -> bool:
    """Whether `op` belongs to another than the first stage of `rank`; every placement gives rank r stage r first."""
    return op.stage >= 0 and op.stage != rank


def cells_of(span: Span) -> tuple[Cell, ...]:
    """The boxes of one span: two side by side for an overlapped pair, none for a transfer or copy."""
    rank, op, start, end = span
    if op.kind in BESIDE:
        return ()
    if op.kind != FB:
        return (Cell(rank, op.kind, is_second(op, rank), op.micro, start, end),)
    forward, backward = op.parts
    middle = start + (end - start) * PAIR_SHARE
    return (
        Cell(rank, forward.kind, is_second(forward, rank), forward.micro, start, middle),
        Cell(rank, backward.kind, is_second(backward, rank), backward.micro, middle, end),
    )


def style(kind: str, second: bool) -> str:
    """The rich style of a cell."""
    return f"{'bold ' if second else ''}{INK[second]} on {PALETTE[kind][1 + second]}"


def label(op: Op, rank: int, width: int) -> str:
    """The longest text for `op` that fits `width` characters; lower case marks the second stage of the rank."""
    letters = [part.kind[0].lower() if is_second(part, rank) else part.kind[0] for part in atoms(op)]
    numbers = ["" if part.micro < 0 else str(part.micro) for part in atoms(op)]
    long = "&".join(map("".join, zip(letters, numbers, strict=True)))
    return next((text for text in (long, "&".join(letters)) if len(text) <= width), "&" if op.kind == FB else "")


def has_pairs(timeline: Timeline) -> bool:
    return any(span.op.kind == FB for span in timeline.spans)


def headline(timeline: Timeline, unit: str = "") -> str:
    """`makespan 66, largest bubble 18 (27 %)`."""
    makespan = timeline.makespan
    bubble = max(timeline.bubble(), default=0.0)
    share = bubble / makespan if makespan else 0.0
    suffix = f" {unit}" if unit else ""
    return f"makespan {makespan:.4g}{suffix}, largest bubble {bubble:.4g}{suffix} ({share:.0%})"


def quantum(timeline: Timeline) -> float | None:
    """The shortest compute duration, if all compute durations are multiples of it (simulated schedules), else None."""
    durations = {round(s.end - s.start, 9) for s in timeline.spans if s.op.kind in COMPUTE and s.end > s.start}
    unit = min(durations, default=0.0)
    if not unit:  # nothing was computed, or in no time
        return None
    return unit if all(abs(d / unit - round(d / unit)) < 1e-6 for d in durations) else None


def columns(timeline: Timeline, width: float, count: int) -> list[list[int | None]]:
    """Cut time into `count` columns of `width` each and find what fills most of each column on each rank.

    Returns:
        for each rank the index of a span, or None where the rank is idle for more than half of the column. Ops of the
        same colours count together, and the longest of them stands for all. Transfers and copies count as idle.
    """
    begin = min((span.start for span in timeline.spans), default=0.0)
    # For each rank and column: colours -> [filled share, share of the longest span, index of that span]
    filled: list[list[dict[object, list[Any]]]] = [[{} for _ in range(count)] for _ in range(timeline.num_ranks)]
    for index, (rank, op, start, end) in enumerate(timeline.spans):
        if op.kind in BESIDE:
            continue
        colours = op.kind, is_second(op, rank)
        left, right = (start - begin) / width, (end - begin) / width
        for column in range(int(left), min(count, int(right) + 1)):
            part = min(right, column + 1.0) - max(left, column)
            entry = filled[rank][column].setdefault(colours, [0.0, 0.0, index])
            entry[0] += part
            if part > entry[1] + 1e-9:
                entry[1:] = part, index
    return [[_most(entries) for entries in row] for row in filled]


def _most(entries: dict[object, list[Any]]) -> int | None:
    if sum(entry[0] for entry in entries.values()) < 0.5 - 1e-9:
        return None
    index: int = max(entries.values(), key=lambda entry: round(entry[0], 9))[2]
    return index


def kinds_of(timeline: Timeline) -> list[str]:
    """The kinds of the palette that the timeline has, in the order of a legend."""
    seen = {part.kind for span in timeline.spans for part in atoms(span.op)}
    return [kind for kind in PALETTE if kind in seen]


def second_note(timeline: Timeline) -> str:
    """What the second shade means: the way back of a vee, the later rounds of a loop, the reverse direction, or nothing
    (one stage a rank)."""
    held = {(part.stage, span.rank) for span in timeline.spans for part in atoms(span.op) if part.stage >= 0}
    if all(stage == rank for stage, rank in held):
        return ""
    if max(stage for stage, _ in held) < timeline.num_ranks:
        return "reverse direction"
    vee = Placement(VEE, timeline.num_ranks)
    if all(stage < vee.num_stages and vee.rank(stage) == rank for stage, rank in held):
        return "way back (stages of the second half)"
    return "later stages of the rank"
