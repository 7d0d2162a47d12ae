"""Transfers move where ranks would wait for each other, and only there; the proof agrees with the model of hosts."""

from __future__ import annotations

import numpy as np
import pytest
from posting import FIRST, host_steps, is_stuck
from test_posting import drawn

from dualpipe_engine.errors import PlanError
from dualpipe_engine.schedule.op import COMM
from dualpipe_engine.schedule.orders.paired import paired_plan
from dualpipe_engine.schedule.passes import lower as lowering
from dualpipe_engine.schedule.passes import unlock as unlocking
from dualpipe_engine.schedule.passes.lower import lower
from dualpipe_engine.schedule.passes.queues import FEW, Events, Queues
from dualpipe_engine.schedule.passes.verify import verify
from dualpipe_engine.schedule.plan import Plan
from dualpipe_engine.schedule.search.make_plan import make_plan

#: Seeds of plans whose ranks would wait for each other.
STUCK = [76, 99, 308, 321, 573]

OUT_OF_ORDER = """\
0F2,0F0,1F1,1B1,(1F3;0B0)FB,0F4,1B3,1F5,(0F6;1B5)FB,0I2,0W2,0B4,0I6,0W6
0F1,0F3,1F0,1I0,1F2,0B1,(0F5;1B2)FB,1F4,0B3,1B4,1F6,1B6,0B5,1W0
"""


def usual(plan, monkeypatch):
    """The plan with transfers at their usual places, and its messages there."""
    kept = []

    def keep(messages, starts, num_micro):
        kept.append(messages)
        return messages

    with monkeypatch.context() as patch:
        patch.setattr(lowering, "unlock", keep)
        return lower(plan), kept[0]


def finishes(plan, messages, early):
    starts = np.cumsum([0, *(len(program) for program in plan.programs[:-1])])
    return Queues(Events(messages, starts, early)).run()


def test_the_proof_is_that_of_the_model(monkeypatch):
    plans = [make_plan(**drawn(seed)) for seed in (*STUCK, *range(100, 115))]
    verdicts = []
    for plan in plans:
        lowered, messages = usual(plan, monkeypatch)
        each = []
        for early in (False, True):
            steps = [host_steps(lowered, rank, 1, 1, FIRST, not early) for rank in range(len(plan.programs))]
            each.append(finishes(plan, messages, early))
            assert each[-1] == (not is_stuck(steps, behind=1, in_flight=FEW))
        assert not finishes(plan, messages, None) or all(each)
        verdicts.append(all(each))
        if each[-1]:
            assert lower(plan) == lowered
    assert not any(verdicts[: len(STUCK)]) and any(verdicts)


def test_messages_that_are_not_taken_in_their_order():
    """Rank 1 takes the second message of an edge before the first, whose header it has asked for early."""
    plan = Plan.from_csv(OUT_OF_ORDER)
    found = lower(plan)
    verify(found)
    for early in (False, True):
        steps = [host_steps(found, rank, 1, 1, FIRST, not early) for rank in range(2)]
        assert not is_stuck(steps, behind=1, in_flight=FEW)


@pytest.mark.parametrize("seed", STUCK)
def test_only_transfers_move(seed, monkeypatch):
    plan = make_plan(**drawn(seed))
    before, _ = usual(plan, monkeypatch)
    after = lower(plan)
    verify(after)
    assert after != before
    for old, new in zip(before.programs, after.programs, strict=True):
        assert sorted(old) == sorted(new)
        assert [op for op in old if op.kind not in COMM] == [op for op in new if op.kind not in COMM]
    moved = sum(
        a != b for old, new in zip(before.programs, after.programs, strict=True) for a, b in zip(old, new, strict=True)
    )
    assert moved < 0.25 * before.num_ops


def test_without_a_place_the_plan_is_refused(monkeypatch):
    monkeypatch.setattr(unlocking._Places, "_ask_earlier", lambda self, rank: False)
    monkeypatch.setattr(unlocking._Places, "_delay", lambda self, rank: False)
    with pytest.raises(PlanError, match="wait for each other's transfers: use another number of micro-batches"):
        lower(make_plan(**drawn(STUCK[0])))


@pytest.mark.parametrize("ranks", [3, 4, 8])
def test_where_two_queues_are_too_few_eight_do(ranks):
    """Ranks that all run pairs feed both neighbours at once."""
    plan = lower(paired_plan(ranks, 16))
    for headers in (None, FIRST):
        for overlapped in (False, True):
            steps = [host_steps(plan, rank, 1, 1, headers, overlapped) for rank in range(ranks)]
            for rule in ({"behind": 1}, {"in_flight": 8}):
                assert not is_stuck(steps, **rule)
