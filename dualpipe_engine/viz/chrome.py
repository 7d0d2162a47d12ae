"""Chrome trace JSON (chrome://tracing, ui.perfetto.dev) of a timeline, and back.

One process a rank. Track 0 holds compute ops, track 1 the tail (gradient reduction and optimizer step), tracks 2 and
up the transfers: transfers of one rank overlap in time, and a track can only show spans that do not. Measured
transfers say in `args` for how long they were waited for; they are no ops, and reading a trace leaves them out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import PlanError
from ..schedule.op import COMM, COMPUTE, Op
from ..schedule.timeline import Hop, Span, Timeline

MICROSECONDS = 1e6  #: of a second, or of the cost model's unit
COMPUTE_TRACK, TAIL_TRACK, COMM_TRACK = 0, 1, 2


def to_chrome(timeline: Timeline, title: str = "", transfers: Sequence[Hop] = ()) -> dict[str, Any]:
    """The trace as a JSON object; each event's name and `args["op"]` are the op's text, times are microseconds.

    Args:
        timeline: simulated or measured.
        title: kept in the file.
        transfers: measured ones, on the clock of `timeline`.
    """
    begin = min([span.start for span in timeline.spans] + [hop.start for hop in transfers], default=0.0)
    busy_until: list[list[float]] = [[] for _ in range(timeline.num_ranks)]  # of each communication track of each rank
    events: list[dict[str, Any]] = []
    for rank, op, start, end in timeline.spans:
        if op.kind in COMM:
            track = COMM_TRACK + _free_lane(busy_until[rank], start, end)
        else:
            track = COMPUTE_TRACK if op.kind in COMPUTE else TAIL_TRACK
        event = {"ph": "X", "pid": rank, "tid": track, "name": str(op), "cat": op.kind}
        times = {"ts": (start - begin) * MICROSECONDS, "dur": (end - start) * MICROSECONDS}
        events.append(event | times | {"args": {"op": str(op), "stage": op.stage, "micro_batch": op.micro}})
    for hop in sorted(transfers, key=lambda hop: hop.start):
        track = COMM_TRACK + _free_lane(busy_until[hop.rank], hop.start, hop.end)
        event = {"ph": "X", "pid": hop.rank, "tid": track, "name": hop.name, "cat": "transfer"}
        times = {"ts": (hop.start - begin) * MICROSECONDS, "dur": (hop.end - hop.start) * MICROSECONDS}
        events.append(event | times | {"args": {"waited_us": hop.waited * MICROSECONDS, "bytes": hop.size}})
    names = [event for rank in range(timeline.num_ranks) for event in _names(rank, len(busy_until[rank]))]
    return {
        "traceEvents": names + events,
        "displayTimeUnit": "ms",
        "otherData": {"ranks": timeline.num_ranks, "title": title},
    }


def write_chrome(path: str | Path, timeline: Timeline, title: str = "", transfers: Sequence[Hop] = ()) -> None:
    """Write `to_chrome(timeline, title, transfers)` to a file."""
    Path(path).write_text(json.dumps(to_chrome(timeline, title, transfers)))


def read_chrome(path: str | Path) -> Timeline:
    """Read a trace file of `write_chrome`. Events without an op, such as those of other profilers, are left out.

    Raises:
        PlanError: the file cannot be read, is no trace, or has no event with the text of an op.
    """
    try:
        data: Any = json.loads(Path(path).read_text())
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


def _free_lane(busy_until: list[float], start: float, end: float) -> int:
    for lane, until in enumerate(busy_until):
        if until <= start:
            busy_until[lane] = end
            return lane
    busy_until.append(end)
    return len(busy_until) - 1


def _names(rank: int, lanes: int) -> list[dict[str, Any]]:
    tracks = ["compute", "tail", *(f"communication {lane + 1}" for lane in range(lanes))]
    return [
        {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}},
        {"ph": "M", "pid": rank, "name": "process_sort_index", "args": {"sort_index": rank}},
        *(
            {"ph": "M", "pid": rank, "tid": track, "name": "thread_name", "args": {"name": name}}
            for track, name in enumerate(tracks)
        ),
    ]


def _span(event: dict[str, Any]) -> Span:
    rank, start = int(event["pid"]), event["ts"] / MICROSECONDS
    if rank < 0:
        raise ValueError(f"process {rank}")
    return Span(rank, Op.parse(event["args"]["op"]), start, start + event["dur"] / MICROSECONDS)
