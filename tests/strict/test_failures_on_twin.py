"""A batch that fails on one rank is raised on all, and the next one is trained on, where no message has a tag."""

import pytest
import strict_runs
import test_failures

from dualpipe_engine.schedule.orders.registry import placement_of

CASES = [  # schedule, pipeline ranks, eager groups, operations in flight, if the first batch fails, module, lost rank
    ("dualpipe", 2, True, 3, False, {}, 0),
    ("zb1p", 2, False, 3, True, {}, 1),
    *(
        pytest.param(*case, marks=pytest.mark.all)
        for case in [
            ("zbv", 3, True, 3, True, {}, 1),
            ("dualpipev", 2, False, 8, False, {}, 1),
            ("dualpipe", 4, True, 3, True, {}, 3),
            ("dualpipe", 4, False, 8, True, {"dynamic_shape": True}, 1),
            ("interleaved", 3, False, 3, False, {}, 2),
        ]
    ),
]


@pytest.mark.parametrize(("schedule", "pp", "eager", "in_flight", "first", "module", "lost"), CASES)
def test_a_failed_batch(on_twin, schedule, pp, eager, in_flight, first, module, lost):
    kinds = dict(test_failures.KINDS)
    placement = placement_of(schedule, pp)
    if lost not in placement.replicas(0) + placement.replicas(placement.num_stages - 1):
        del kinds["loader"]  # of ranks that read data
    config = test_failures.settings(schedule)
    given = {"ranks": pp, "config": config, "cases": list(kinds), "lost": lost, "first": first, **module}
    test_failures.check(on_twin(pp, strict_runs.survived, eager, in_flight, **given), kinds)
