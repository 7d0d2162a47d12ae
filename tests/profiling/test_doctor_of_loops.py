"""The doctor on jobs with several stages a rank: what it simulates has as many."""

from dataclasses import replace

import pytest
from test_doctor import HEALTHY, found, profile

from dualpipe_engine.schedule.search.compare import compare
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.simulate import simulate


def test_few_micro_batches():
    for stages in (1, 3):
        plan = make_plan("interleaved", 4, 4, HEALTHY, stages_per_rank=stages)
        case = replace(profile("interleaved", micros=4), plan=plan)
        finding = found(case)["few micro-batches"]
        assert '"gradient_accumulation_steps": 8' in finding.advice
        more = make_plan("interleaved", 4, 8, HEALTHY, optimize=True, stages_per_rank=stages)
        expected = simulate(plan, HEALTHY).makespan - simulate(more, HEALTHY).makespan / 2
        assert finding.gain == pytest.approx(expected)


def test_another_schedule_has_its_own_stages():
    costs = replace(HEALTHY, fb=None)
    case = profile("interleaved", micros=8, costs=costs)
    finding = found(case)["another schedule is faster"]
    whole = costs.joined(2)
    rows = {row.schedule: row for row in compare(4, 8, whole)}
    named = next(name for name in rows if f'"schedule": "{name}"' in finding.advice)
    assert rows[named].makespan == pytest.approx(simulate(case.plan, costs).makespan - finding.gain)
    assert rows["interleaved"].makespan == pytest.approx(simulate(case.plan, costs).makespan)
