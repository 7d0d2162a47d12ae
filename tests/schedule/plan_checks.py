"""What must hold for every compute plan, checked without the code under test where possible."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import pairwise

import numpy as np

from dualpipe_engine.schedule.columns import Columns, columns
from dualpipe_engine.schedule.op import Op, atoms
from dualpipe_engine.schedule.plan import Plan
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import simulate


def check_plan(plan: Plan) -> None:
    """Every (stage, micro-batch) once on its rank, in a legal order, first in first out for W, and it completes."""
    where = f"{plan.schedule}, {plan.placement}, {plan.num_micro} micro-batches"
    seen: Counter[tuple[str, int, int]] = Counter()
    for rank, program in enumerate(plan.programs):
        done: set[tuple[str, int, int]] = set()
        split, drained = [], []
        for op in program:
            parts = atoms(op)
            if op.kind == "FB":
                forward, backward = parts
                assert (forward.kind, backward.kind) in (("F", "B"), ("F", "I")), f"{where}: {op}"
                assert forward.micro != backward.micro, f"{where}: {op}"
            for kind, stage, micro, _ in parts:
                assert plan.placement.rank_of(stage, micro) == rank, f"{where}: {op} on rank {rank}"
                before = {"B": "F", "I": "F", "W": "I"}.get(kind)
                assert before is None or (before, stage, micro) in done, f"{where}: {op} before its {before}"
                seen[kind, stage, micro] += 1
                if kind == "I":
                    split.append((stage, micro))
                elif kind == "W":
                    drained.append((stage, micro))
            done.update((kind, stage, micro) for kind, stage, micro, _ in parts)
        assert split == drained, f"{where}: W of rank {rank} not first in, first out"
    for stage in range(plan.placement.num_stages):
        for micro in range(plan.num_micro):
            counts = [seen.pop((kind, stage, micro), 0) for kind in "FBIW"]
            assert counts in ([1, 1, 0, 0], [1, 0, 1, 1]), f"{where}: stage {stage}, micro-batch {micro}: {counts}"
    assert not seen, f"{where}: ops outside the plan: {seen}"
    spans = simulate(plan, CostModel()).spans
    assert len(spans) == plan.num_ops, where


def check_columns(plan: Plan) -> None:
    """Those that the plan was made with, if any, are those of its programs."""
    for name, given, found in zip(Columns._fields, plan.columns, columns(plan.programs), strict=True):
        assert given.dtype == found.dtype, f"{name} of {plan.schedule}"
        assert np.array_equal(given, found), f"{name} of {plan.schedule}, {plan.placement}"


def order_digest(plan: Plan) -> str:
    """SHA-256 of the op texts, blanks between ops, a line a rank."""
    return hashlib.sha256("\n".join(" ".join(row) for row in plan.texts()).encode()).hexdigest()


def durations(costs: CostModel, plan: Plan) -> dict[Op, float]:
    return {op: costs.duration(op) for program in plan.programs for op in program}


def longest_path(plan: Plan, costs: CostModel) -> float:
    """Makespan by relaxing all dependencies until nothing moves; slow and simple."""
    placement = plan.placement
    makers = {
        (part.kind == "F", part.stage, part.micro): op
        for program in plan.programs
        for op in program
        for part in atoms(op)
        if part.kind != "W"
    }
    edges = []
    for rank, program in enumerate(plan.programs):
        edges += [(a, b, 0.0) for a, b in pairwise(program)]
        for op in program:
            for kind, stage, micro, _ in atoms(op):
                if kind == "F" and stage:
                    source = (True, stage - 1, micro)
                elif kind in "BI" and stage + 1 < placement.num_stages:
                    source = (False, stage + 1, micro)
                else:
                    continue
                hop = costs.comm if placement.rank_of(source[1], micro) != rank else 0.0
                edges.append((makers[source], op, hop))
    seconds = durations(costs, plan)
    start = dict.fromkeys(seconds, 0.0)
    moved = True
    while moved:
        moved = False
        for a, b, hop in edges:
            earliest = start[a] + seconds[a] + hop
            if earliest > start[b]:
                start[b], moved = earliest, True
    return max(start[op] + seconds[op] for op in start)
