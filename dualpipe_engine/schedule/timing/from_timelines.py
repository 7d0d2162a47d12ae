"""From measured timelines to the cost model that they show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import median

from ..op import FB, B, F, I, W
from ..timeline import Timeline
from .costs import CostModel


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
