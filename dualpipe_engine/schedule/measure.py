"""From a measured timeline to the cost model that it shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import median

from .costs import CostModel
from .op import B, F, I, W
from .timeline import Timeline


def measured_costs(timelines: Iterable[Timeline], num_stages: int) -> CostModel:
    """Median seconds of F, I and W of each stage over some batches.

    A stage that ran full backwards only is given their time as I and no W. Pairs that ran as one op are not read: what
    the halves cost alone and together is known only after both have been tried.

    Args:
        timelines: measured, of one pipeline.
        num_stages: stages of the placement; a stage without spans costs nothing.
    """
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    for timeline in timelines:
        for span in timeline.spans:
            seconds[span.op.kind, span.op.stage].append(span.end - span.start)
    found = {key: median(values) for key, values in seconds.items()}
    forward, inputs, weights = [], [], []
    for stage in range(num_stages):
        full, apart, weight = (found.get((kind, stage)) for kind in (B, I, W))
        forward.append(found.get((F, stage), 0.0))
        weights.append(weight or 0.0)
        inputs.append(apart if apart is not None else max(0.0, (full or 0.0) - (weight or 0.0)))
    return CostModel(f=tuple(forward), i=tuple(inputs), w=tuple(weights))
