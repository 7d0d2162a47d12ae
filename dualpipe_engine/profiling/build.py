"""From the records of all ranks to a profile and its trace."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ..errors import ProfileError
from ..schedule.aside import write_whole
from ..schedule.op import COMM, COMPUTE, NONE, REDUCE
from ..schedule.plan import Plan
from ..schedule.records import DATA, DRAIN, FLUSH, LOSS, OP, PHASE, RECEIVE, SEND, BatchRecord, RankRecord
from ..schedule.timeline import Span, Timeline
from ..schedule.timing.from_timelines import measured_costs
from ..viz.chrome import COMM_TRACK, COMPUTE_TRACK, MICROSECONDS, REDUCTION_TRACK, Note, to_chrome
from .breakdown import CATEGORIES, COMMUNICATION, REDUCING, Breakdown, Message, break_down, messages, reductions
from .profile import KEY, Profile, RankProfile


def build_profile(records: Sequence[RankRecord], plan: Plan) -> Profile:
    """Read the records of all ranks.

    Args:
        records: of all ranks and replicas, in any order, with the same number of steps.
        plan: what the pipelines ran.

    Raises:
        ProfileError: there is no step.
    """
    pipelines = _pipelines(records)
    count = len(records[0].steps) if records else 0
    if not count:
        raise ProfileError("no step has been recorded: call enable_profiling() before the steps to look at")
    ranks: list[RankProfile] = []
    timelines: list[Timeline] = []
    transfers: list[float] = []
    makespan = 0.0
    for pipeline in pipelines:
        computed = [_computed(pipeline, step) for step in range(count)]
        parts = [break_down([record.steps[step] for record in pipeline]) for step in range(count)]
        for step in range(count):
            found = messages([record.steps[step] for record in pipeline])
            transfers += [message.arrived - message.sent for message in found]
        bubbles = [timeline.bubble() for timeline in computed]
        for rank, record in enumerate(pipeline):
            bubble = fmean(bubbles[step][rank] for step in range(count))
            ranks.append(_rank_profile(record, [parts[step][rank] for step in range(count)], bubble))
        makespan = makespan or fmean(timeline.makespan for timeline in computed)
        timelines += computed
    costs = measured_costs(timelines, plan.placement.num_stages)
    costs = replace(costs, comm=median(transfers) if transfers else 0.0)
    steps = [max(record.steps[step].end - record.steps[step].start for record in pipelines[0]) for step in range(count)]
    return Profile(plan.compute_only(), costs, ranks, steps, makespan, dict(records[0].facts))


def write_profile(path: Path, profile: Profile, records: Sequence[RankRecord]) -> None:
    """Write the profile, with the trace of its typical step.

    Raises:
        ProfileError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({**make_trace(profile, records), KEY: profile.to_json()}))
    except OSError as error:
        raise ProfileError(f"cannot write the profile {path}: {error.strerror or error}") from None


def make_trace(profile: Profile, records: Sequence[RankRecord]) -> dict[str, Any]:
    """The typical step as a Chrome trace: a process a rank, with tracks for computation, reductions and transfers.

    Ops of the first pipeline carry their text, so the trace can be drawn; other replicas are there to be looked at.
    """
    size, number = profile.plan.placement.num_ranks, profile.typical
    spans: list[Span] = []
    notes: list[Note] = []
    processes: dict[int, str] = {}
    for replica, pipeline in enumerate(_pipelines(records)):
        steps = [record.steps[number] for record in pipeline]
        found: list[Span] = []
        for rank, step in enumerate(steps):
            process = replica * size + rank
            name = f"rank {rank}" if not replica else f"replica {replica} rank {rank}"
            processes[process] = f"{name} ({pipeline[rank].host})"
            found += _spans(process, step)
            notes += _notes(process, step)
        for message in messages(steps):
            op = message.mark.op
            found.append(Span(replica * size + message.source, op, message.sent, message.arrived))
            notes.append(_arrival(replica * size, message))
        if replica:
            notes += [_undrawn(span) for span in found]
        else:
            spans = found
    title = f"{profile.plan.schedule}, {size} ranks, {profile.plan.num_micro} micro-batches"
    return to_chrome(Timeline(size, spans), title, notes, processes)


def _pipelines(records: Sequence[RankRecord]) -> list[list[RankRecord]]:
    """The records of each replica by rank, on the clock of the first rank."""
    found: dict[int, list[RankRecord]] = defaultdict(list)
    for record in sorted(records, key=lambda record: (record.replica, record.rank)):
        found[record.replica].append(record.aligned())
    return list(found.values())


def _computed(pipeline: Sequence[RankRecord], step: int) -> Timeline:
    spans = [
        Span(rank, mark.op, mark.start, mark.end)
        for rank, record in enumerate(pipeline)
        for mark in record.steps[step].marks
        if mark.kind == OP and mark.op.kind in COMPUTE
    ]
    return Timeline(len(pipeline), spans)


def _rank_profile(record: RankRecord, parts: Sequence[Breakdown], bubble: float) -> RankProfile:
    lengths: dict[str, list[float]] = defaultdict(list)
    for step in record.steps:
        for mark in step.marks:
            if mark.kind == OP and mark.op.kind in COMPUTE:
                lengths[f"{mark.op.kind} {mark.op.stage}"].append(mark.end - mark.start)
    return RankProfile(
        record.rank,
        record.replica,
        record.host,
        {name: fmean(part.seconds[name] for part in parts) for name in CATEGORIES},
        {name: fmean(part.hidden[name] for part in parts) for name in (COMMUNICATION, REDUCING)},
        {name: median(values) for name, values in sorted(lengths.items())},
        bubble,
        record.memory_bytes,
        record.clock,
        record.clock_error,
    )


def _spans(process: int, step: BatchRecord) -> list[Span]:
    spans = [
        Span(process, mark.op, mark.start, mark.end)
        for mark in step.marks
        if mark.kind == OP and mark.op.kind != REDUCE
    ]
    spans += [Span(process, mark.op, start, end) for start, end, mark in reductions(step) if mark.op.stage != NONE]
    return spans


def _notes(process: int, step: BatchRecord) -> list[Note]:
    """What a rank did beside its ops: waits, hand-overs, transfers within layers."""
    notes = []
    for mark in step.marks:
        if mark.kind == OP and mark.op.kind == REDUCE:
            notes.append(Note(process, COMPUTE_TRACK, f"start {mark.op}", "start", mark.start, mark.end))
        elif mark.kind == PHASE:
            waited = {"waited_us": mark.waited * MICROSECONDS}
            notes.append(Note(process, COMM_TRACK, mark.name, PHASE, mark.start, max(mark.start, mark.end), waited))
        elif mark.kind in _TEXTS:
            text = _TEXTS[mark.kind].format(mark.op)
            notes.append(Note(process, COMPUTE_TRACK, text, mark.kind, mark.start, mark.end))
    for start, end, mark in reductions(step):
        if mark.op.stage == NONE:
            notes.append(Note(process, REDUCTION_TRACK, "reduce shared weights", REDUCE, start, end))
    return notes


_TEXTS = {
    RECEIVE: "wait for the input of {}",
    SEND: "hand over {}",
    FLUSH: "wait for sends",
    DATA: "read data of {}",
    DRAIN: "wait for reductions",
    LOSS: "mean loss",
}


def _arrival(first: int, message: Message) -> Note:
    """The transfer as its target sees it."""
    received = message.mark.op.other_end()
    return Note(first + message.target, COMM_TRACK, str(received), received.kind, message.sent, message.arrived)


def _undrawn(span: Span) -> Note:
    kind = span.op.kind
    track = REDUCTION_TRACK if kind == REDUCE else COMM_TRACK if kind in COMM else COMPUTE_TRACK
    return Note(span.rank, track, str(span.op), kind, span.start, span.end)
