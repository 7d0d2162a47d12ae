"""Random changes of random layers, under a random schedule: as in one process, or refused by one sentence."""

from __future__ import annotations

import any_change_runs
import pytest
from any_change_runs import CHANGES, GROUPS, SCHEDULES, draw
from test_changed import same

SHORT = range(8)
LONG = [range(first, first + 16) for first in range(8, 136, 16)]


def check(ranks, seeds):
    seeds = list(seeds)
    while seeds:
        found = ranks.run(2, any_change_runs.changed, seeds=seeds)
        for seed in found[0]:
            case, each = draw(seed), [rank[seed] for rank in found]
            refused = [rank for rank in each if isinstance(rank, str)]
            if refused:
                assert len(refused) == 2, (seed, case, each)
                assert case.refused is not None, (seed, case, refused)
                assert all(case.refused in text for text in refused), (seed, case, refused)
            else:
                assert case.refused is None, (seed, case)
                same(each, any_change_runs.expected(case))
        seeds = seeds[len(found[0]) :]  # an error on some ranks only has ended the job


def test_some_changes(ranks):
    check(ranks, SHORT)
    assert {draw(seed).schedule for seed in SHORT} == {*SCHEDULES}


@pytest.mark.all
@pytest.mark.parametrize("seeds", LONG)
def test_any_changes(ranks, seeds):
    check(ranks, seeds)


def test_every_change_is_drawn_under_every_schedule():
    cases = [draw(seed) for seeds in LONG for seed in seeds]
    for schedule in SCHEDULES:
        of = [case for case in cases if case.schedule == schedule]
        assert {kind for case in of for kind in case.kinds} == {*CHANGES}
        assert {case.groups for case in of} == {*GROUPS}
        assert {(case.zero, case.adam) for case in of} == {(zero, adam) for zero in (0, 1) for adam in (False, True)}
        assert {bool(case.flip) for case in of} == {False, True}
