"""How long the planner takes: generate a schedule's plan, optimised or not, lower it and verify it.

Seconds are those of the processor, so that what else runs counts little. Beside them, which are the machine's, a
plan's time counts in those of a fixed piece of Python (`yardstick`).
"""

from __future__ import annotations

import gc
from itertools import pairwise
from time import process_time
from typing import Any

from dualpipe_engine.schedule.passes.lower import lower
from dualpipe_engine.schedule.passes.verify import verify
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.costs import UNIT

SIZES = ((8, 64), (32, 512), (64, 1024), (64, 2048), (128, 4096))  #: ranks and micro-batches
OPTIMIZED = 128 * 4096  #: the most ranks times micro-batches that are optimised too


def yardstick() -> float:
    """Seconds of a fixed piece of Python: a million tuples go into a dictionary, and are looked up there. The least of
    two."""

    def once() -> float:
        start = process_time()
        known = {(number % 1000, number // 1000): number for number in range(1_000_000)}
        for key in known:
            assert known[key] >= 0
        return process_time() - start

    gc.collect()
    return min(once() for _ in range(2))


def plan_row(schedule: str, num_ranks: int, num_micro: int, optimize: bool) -> dict[str, Any]:
    """Seconds of each step of planning; `ops_per_second` counts the ops of the lowered plan, `yardstick` is the mean of
    the one before and the one behind, since machines change their pace."""
    before = yardstick()
    clock = [process_time()]
    plan = make_plan(schedule, num_ranks, num_micro, UNIT, optimize=optimize)
    clock.append(process_time())
    lowered = lower(plan)
    clock.append(process_time())
    verify(lowered)
    clock.append(process_time())
    make, lowering, checking = (end - start for start, end in pairwise(clock))
    compute_ops, ops, seconds = plan.num_ops, lowered.num_ops, clock[-1] - clock[0]
    del plan, lowered  # the collector would look through them
    stick = (before + yardstick()) / 2
    return {
        "schedule": schedule,
        "order": "optimised" if optimize else "reference",
        "ranks": num_ranks,
        "micro_batches": num_micro,
        "compute_ops": compute_ops,
        "ops": ops,
        "make": make,
        "lower": lowering,
        "verify": checking,
        "seconds": seconds,
        "yardstick": stick,
        "yardsticks": seconds / stick,
        "ops_per_second": ops / seconds,
    }
