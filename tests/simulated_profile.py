"""A profile as the simulator sees it: what the tests of doctor, profile and page look at."""

from collections import defaultdict

from dualpipe_engine.profiling.breakdown import CATEGORIES, COMMUNICATION, REDUCING, WAITING
from dualpipe_engine.profiling.profile import Profile, RankProfile
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import simulate

HEALTHY = CostModel(0.01, 0.01, 0.01, 0.021)  # pairs overlap: 70 %


def profile(
    schedule="dualpipe", micros=48, costs=HEALTHY, rank0=None, slow=1.0, steps=None, optimize=True, size=4, **facts
):
    """A profile of `size` ranks as the simulator sees it; `rank0` adds seconds to categories of its first rank."""
    plan = make_plan(schedule, size, micros, costs, optimize=optimize)
    timeline = simulate(plan, costs)
    ranks = []
    for rank, bubble in enumerate(timeline.bubble()):
        seconds, ops = dict.fromkeys(CATEGORIES, 0.0), defaultdict(list)
        for span in timeline.of_rank(rank):
            length = (span.end - span.start) * (slow if rank == 0 else 1)
            seconds[span.op.kind] += length
            ops[f"{span.op.kind} {span.op.stage}"].append(length)
        seconds[WAITING] = bubble
        for name, more in (rank0 or {}).items():
            seconds[name] += more if rank == 0 else 0
        lengths = {name: values[0] for name, values in ops.items()}
        ranks.append(RankProfile(rank, 0, "here", seconds, {COMMUNICATION: 0.1, REDUCING: 0.1}, lengths, bubble))
    step = timeline.makespan
    known = {"zero_stage": 1, "replicas": 1, "weight_split": 0.9, "device": "cpu", "partition_method": None, **facts}
    return Profile(plan, costs, ranks, steps or [step] * 5, step, known)
