"""The proof by arrays and the rules op by op: one says yes where the other does, and both count the same."""

from __future__ import annotations

import pytest
from test_lower_verify import mutants

from dualpipe_engine.schedule.op import Op
from dualpipe_engine.schedule.orders.registry import SCHEDULES
from dualpipe_engine.schedule.passes import verify as by_rules
from dualpipe_engine.schedule.passes.lower import forward_only, lower
from dualpipe_engine.schedule.passes.proof import Unproved, prove
from dualpipe_engine.schedule.placement import BIDIRECTIONAL, LINEAR, LOOP, VEE, Placement
from dualpipe_engine.schedule.plan import Plan
from dualpipe_engine.schedule.search.make_plan import make_plan


@pytest.fixture
def rules(monkeypatch):
    """`verify` without the proof."""

    def unproved(plan):
        raise Unproved

    monkeypatch.setattr(by_rules, "prove", unproved)
    return by_rules.verify


@pytest.mark.parametrize("name", SCHEDULES)
def test_both_count_the_same(name, rules):
    for ranks, micros in ((2, 1), (2, 5), (4, 3), (6, 13)):
        plan = make_plan(name, ranks, micros)
        for each in (plan, lower(plan)):
            assert prove(each) == rules(each)


@pytest.mark.parametrize(
    "placement", [Placement(LINEAR, 1), Placement(BIDIRECTIONAL, 4), Placement(VEE, 3), Placement(LOOP, 2, 3)]
)
def test_both_count_the_same_of_forward_only_plans(placement, rules):
    plan = forward_only(placement, 5)
    for each in (plan, lower(plan, train=False)):
        assert prove(each) == rules(each)


@pytest.mark.parametrize(
    ("name", "ranks", "micros", "lowered"),
    [
        ("dualpipe", 2, 3, True),
        ("zbv", 2, 2, False),
        pytest.param("zbv", 2, 2, True, marks=pytest.mark.all),
        pytest.param("interleaved_zb", 2, 2, True, marks=pytest.mark.all),
        pytest.param("dualpipe", 4, 5, True, marks=pytest.mark.all),
    ],
)
def test_whatever_breaks_a_rule_is_unproved_and_nothing_else(name, ranks, micros, lowered, rules):
    plan = make_plan(name, ranks, micros)
    judged = {True: 0, False: 0}
    for _, what, mutant in mutants(lower(plan) if lowered else plan):
        verdicts = []
        for judge in (prove, rules):
            try:
                judge(mutant)
                verdicts.append(True)
            except (Unproved, by_rules.VerifyError):
                verdicts.append(False)
        assert verdicts[0] == verdicts[1], what
        judged[verdicts[0]] += 1
    assert min(judged.values()) > 0


@pytest.mark.parametrize("wrong", [Op("F", 2, 0), Op("F", -1, 0), Op("W", 0, 2), Op("F", 10**30, 0), Op("F", 0, -1)])
def test_ops_of_no_stage_or_micro_batch_are_unproved(wrong):
    plan = make_plan("1f1b", 2, 2)
    with pytest.raises(Unproved):
        prove(Plan(plan.placement, 2, (plan.programs[0], (*plan.programs[1], wrong))))
