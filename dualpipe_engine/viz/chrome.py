"""Chrome trace JSON (chrome://tracing, ui.perfetto.dev) of a timeline, and back.

One process a rank, one track a stream: track 0 holds computation (the optimizer step too), track 1 the reduction of
gradients, tracks 2 and up the transfers and copies: those of one rank overlap in time, and a track can only show spans
that do not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ..errors import PlanError
from ..schedule.aside import write_whole
from ..schedule.op import BESIDE, REDUCE, Op
from ..schedule.plain_json import parse, read_text
from ..schedule.timeline import Span, Timeline

MICROSECONDS = 1e6  #: of a second, or of the cost model's unit
COMPUTE_TRACK, REDUCTION_TRACK, COMM_TRACK = 0, 1, 2


class Note(NamedTuple):
    """Something that viewers of traces show and `read_chrome` leaves out, because it is no op of the schedule.

    Args:
        process: number of the process it is shown in.
        track: one of the tracks of this module.
        name: its text.
        kind: its category.
        start: seconds, as is `end`.
        end: see `start`.
        args: shown when it is selected.
    """

    process: int
    track: int
    name: str
    kind: str
    start: float
    end: float
    args: Mapping[str, Any] = MappingProxyType({})


def to_chrome(
    timeline: Timeline, title: str = "", notes: Sequence[Note] = (), processes: Mapping[int, str] | None = None
) -> dict[str, Any]:
    """The trace as a JSON object; each event's name and `args["op"]` are the op's text, times are microseconds.

    Args:
        timeline: the ops; the rank is the number of the process.
        title: kept in the file.
        notes: shown beside the ops.
        processes: number -> name of a process; a rank without one is called by its number.
    """
    everything: list[Span | Note] = [*timeline.spans, *notes]
    everything.sort(key=lambda each: each.start)
    begin = everything[0].start if everything else 0.0
    names = {rank: f"rank {rank}" for rank in range(timeline.num_ranks)} | dict(processes or {})
    busy_until: dict[int, list[float]] = {process: [] for process in names}  # of each communication track
    events = []
    for each in everything:
        if isinstance(each, Note):
            process, track, name, kind, start, end, shown = each
            args = dict(shown)
        else:
            process, op, start, end = each
            track, name, kind = _track(op), str(op), op.kind
            args = {"op": name, "stage": op.stage, "micro_batch": op.micro}
        if track == COMM_TRACK:
            track += _free_lane(busy_until[process], start, end)
        event = {"ph": "X", "pid": process, "tid": track, "name": name, "cat": kind}
        times = {"ts": (start - begin) * MICROSECONDS, "dur": (end - start) * MICROSECONDS}
        events.append(event | times | {"args": args})
    rows = [event for process in names for event in _names(process, names[process], len(busy_until[process]))]
    return {
        "traceEvents": rows + events,
        "displayTimeUnit": "ms",
        "otherData": {"ranks": timeline.num_ranks, "title": title},
    }


def write_chrome(path: str | Path, timeline: Timeline, title: str = "", notes: Sequence[Note] = ()) -> None:
    """Write `to_chrome(timeline, title, notes)` to a file."""
    write_whole(path, json.dumps(to_chrome(timeline, title, notes)))


def read_chrome(path: str | Path) -> Timeline:
    """Read a trace file of `write_chrome`. Events without an op, such as those of other profilers, are left out.

    Raises:
        PlanError: the file cannot be read, is no trace, or has no event with the text of an op.
    """
    try:
        data: Any = parse(read_text(path))
    except (OSError, ValueError) as error:
        raise PlanError(f"{path}: {error}") from None
    events = data.get("traceEvents") if isinstance(data, dict) else data
    if not isinstance(events, list):
        raise PlanError(f'{path}: not a Chrome trace: no list "traceEvents"')
    try:
        spans = [_span(event) for event in events if event.get("ph") == "X" and "op" in event.get("args", {})]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{path}: a trace event is malformed ({type(error).__name__}: {error})") from None
    if not spans:
        raise PlanError(f'{path}: no event of this trace has the text of an op in args["op"]')
    spans.sort(key=lambda span: (span.rank, span.start, span.end))
    other = data.get("otherData") if isinstance(data, dict) else None
    ranks = other.get("ranks") if isinstance(other, dict) else None
    return Timeline(max(1 + spans[-1].rank, ranks if isinstance(ranks, int) else 0), spans)


def _track(op: Op) -> int:
    if op.kind in BESIDE:
        return COMM_TRACK
    return REDUCTION_TRACK if op.kind == REDUCE else COMPUTE_TRACK


def _free_lane(busy_until: list[float], start: float, end: float) -> int:
    for lane, until in enumerate(busy_until):
        if until <= start:
            busy_until[lane] = end
            return lane
    busy_until.append(end)
    return len(busy_until) - 1


def _names(process: int, name: str, lanes: int) -> list[dict[str, Any]]:
    tracks = ["compute", "reduction", *(f"communication {lane + 1}" for lane in range(lanes))]
    return [
        {"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}},
        {"ph": "M", "pid": process, "name": "process_sort_index", "args": {"sort_index": process}},
        *(
            {"ph": "M", "pid": process, "tid": track, "name": "thread_name", "args": {"name": text}}
            for track, text in enumerate(tracks)
        ),
    ]


def _span(event: dict[str, Any]) -> Span:
    rank, start = int(event["pid"]), event["ts"] / MICROSECONDS
    if rank < 0:
        raise ValueError(f"process {rank}")
    return Span(rank, Op.parse(event["args"]["op"]), start, start + event["dur"] / MICROSECONDS)
