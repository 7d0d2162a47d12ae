"""Drawing of a timeline in the terminal (rich). One row a rank, time to the right."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

from ..schedule.op import FB, STEP, B, F, atoms
from ..schedule.timeline import Timeline
from .cells import PALETTE, columns, has_pairs, headline, is_second, kinds_of, label, quantum, second_note, style

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


Item = TypeVar("Item")

PLAIN_WIDTH = 120  #: columns where the output is no terminal


def wide_console() -> Console:
    """A console that keeps tables whole, in logs and pipes too, where rich would assume 80 columns."""
    from .console import WholeTables

    console = WholeTables()
    return console if console.is_terminal else WholeTables(width=max(PLAIN_WIDTH, console.width))


def tracked(items: Iterable[Item], total: int, what: str) -> list[Item]:
    """All of `total` items, with a progress bar on stderr while they are made, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        return list(progress.track(items, total, description=what))


def spinning(what: str) -> AbstractContextManager[object]:
    """Context of work that takes who knows how long: a spinner on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(what)


def draw_terminal(timeline: Timeline, console: Console, title: str = "", unit: str = "") -> None:
    """Print the timeline, scaled to the width of `console`; letters carry the meaning where there is no colour."""
    from rich.text import Text

    gutter = len(f"Device {timeline.num_ranks - 1} ")
    room = max(20, console.width - gutter - 1)
    makespan = timeline.makespan or 1.0
    unit_width = quantum(timeline)
    per_unit = int(room * unit_width / makespan + 1e-9) if unit_width else 0
    width = unit_width / per_unit if unit_width and per_unit else makespan / room  # whole columns a cell where they fit
    count = round(makespan / width)
    fill = " " if console.color_system and not console.no_color else "-"

    console.print(Text(", ".join(filter(None, (title, headline(timeline, unit)))), style="bold"))
    for rank, row in enumerate(columns(timeline, width, count)):
        text = Text(f"{f'Device {rank}':<{gutter}}", no_wrap=True, overflow="crop")
        for index, run in groupby(row):
            length = sum(1 for _ in run)
            if index is None:
                text.append(" " * length)
            else:
                _append_op(text, timeline, index, length, fill)
        console.print(text)
    for line in _axis(count, width, gutter, unit):
        console.print(Text(line, style="dim", no_wrap=True, overflow="crop"))
    legend = Text()
    for item in _terminal_legend(timeline):
        if legend and len(legend) + len(item) > console.width:
            console.print(legend)
            legend = Text()
        legend.append_text(item)
    console.print(legend)


def _append_op(text: Text, timeline: Timeline, index: int, length: int, fill: str) -> None:
    rank, op, _, _ = timeline.spans[index]
    content = label(op, rank, length).ljust(length, fill)
    split = content.index("&") if op.kind == FB else length
    parts = atoms(op)
    for part, piece in zip((parts[0], parts[-1]), (content[:split], content[split:]), strict=True):
        text.append(piece, style=style(part.kind, is_second(part, rank)))


def _axis(count: int, width: float, gutter: int, unit: str) -> tuple[str, str]:
    step = next(s * 10.0**e for e in range(-40, 41) for s in (1, 2, 5) if s * 10.0**e / width >= 8)
    ruler, numbers = ["-"] * (count + 1), [" "] * (gutter + count + 12)
    for tick in range(int(count * width / step + 1e-9) + 1):
        column = round(tick * step / width)
        ruler[column] = "+"
        number = f"{tick * step:.6g}"
        numbers[gutter + column : gutter + column + len(number)] = number
    return " " * gutter + "".join(ruler), ("".join(numbers).rstrip() + (f" {unit}" if unit else ""))


def _terminal_legend(timeline: Timeline) -> list[Text]:
    from rich.text import Text

    note = second_note(timeline)
    items = []
    for kind in kinds_of(timeline):
        item = Text.assemble((f" {kind[0]} ", style(kind, False)))
        if note and kind != STEP:
            item.append(f"{kind[0].lower()} ", style=style(kind, True))
        items.append(item.append(f" {PALETTE[kind][0]}   "))
    if has_pairs(timeline):
        item = Text.assemble((" F", style(F, False)), ("&b " if note else "&B ", style(B, bool(note))))
        items.append(item.append(" overlapped pair   "))
    if note:
        items.append(Text(f"lower case, dark: {note}"))
    return items
