"""Measured costs: a plan that shows what pairs cost, and from measured timelines to the cost model they show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import median

from .costs import CostModel
from .op import FB, B, F, I, Op, W, pair
from .placement import LINEAR, Placement
from .plan import Plan
from .timeline import Timeline


def paired_plan(num_ranks: int, num_micro: int) -> Plan:
    """1F1B with one more micro-batch in flight, so that each forward can run as a pair with a backward.

    Nobody trains with it: it shows what a pair costs on the stages of the linear placement.

    Raises:
        PlanError: a count is below 1.
    """
    placement = Placement(LINEAR, num_ranks)
    programs = []
    for stage in range(num_ranks):
        ahead = min(num_ranks - stage, num_micro)
        ops = [Op(F, stage, micro) for micro in range(ahead)]
        for micro in range(num_micro):
            backward = Op(B, stage, micro)
            ops.append(pair(Op(F, stage, micro + ahead), backward) if micro + ahead < num_micro else backward)
        programs.append(tuple(ops))
    return Plan(placement, num_micro, tuple(programs), "paired")


def measured_costs(timelines: Iterable[Timeline], num_stages: int) -> CostModel:
    """Median seconds of F, I and W of each stage over some batches, and what pairs cost where some ran as one op.

    A stage that ran full backwards only is given their time as I and no W. A pair of two stages counts for both: its
    time, by that of its halves one after the other, is the overlap factor of `CostModel`.

    Args:
        timelines: measured, of one pipeline.
        num_stages: stages of the placement; a stage without spans costs nothing.
    """
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    pairs: list[tuple[int, int, float]] = []
    for timeline in timelines:
        for span in timeline.spans:
            if span.op.kind == FB:
                forward, backward = span.op.parts
                pairs.append((forward.stage, backward.stage, span.end - span.start))
            else:
                seconds[span.op.kind, span.op.stage].append(span.end - span.start)
    found = {key: median(values) for key, values in seconds.items()}
    f, i, w = [], [], []
    for stage in range(num_stages):
        full, apart, weight = (found.get((kind, stage)) for kind in (B, I, W))
        f.append(found.get((F, stage), 0.0))
        w.append(weight or 0.0)
        i.append(apart if apart is not None else max(0.0, (full or 0.0) - (weight or 0.0)))
    factors: dict[int, list[float]] = defaultdict(list)
    for there, back, together in pairs:
        apart = f[there] + i[back] + w[back]
        if apart:
            factors[there].append(together / apart)
            factors[back].append(together / apart)
    whole = [sum(parts) for parts in zip(f, i, w, strict=True)]
    fb = tuple(total * median(factors[s]) if factors[s] else total for s, total in enumerate(whole))
    return CostModel(tuple(f), tuple(i), tuple(w), fb if pairs else None)
