"""Which activations leave for host memory and when they are back; what the verifier and the simulator make of it."""

from __future__ import annotations

import pytest

from dualpipe_engine.errors import PlanError
from dualpipe_engine.schedule.op import COPIES, OFFLOAD, RELOAD, Op, atoms
from dualpipe_engine.schedule.orders.registry import SCHEDULES
from dualpipe_engine.schedule.passes.lower import lower
from dualpipe_engine.schedule.passes.offload import offload
from dualpipe_engine.schedule.passes.verify import VerifyError, verify
from dualpipe_engine.schedule.plan import Plan
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.costs import UNIT, CostModel
from dualpipe_engine.schedule.timing.simulate import makespan_of, peak_activations, peak_bytes, simulate


def plan_of(text: str) -> Plan:
    return Plan.from_csv("\n".join(",".join(row.split()) for row in text.strip().splitlines()))


ONE = "0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3"


def test_where_the_copies_stand():
    """An op after F for the copy to run under, one before the backward for the copy back; all in between without."""
    found = offload(plan_of(ONE), True).texts()[0]
    assert " ".join(found[:7]) == "0F0 0F1 0OFFLOAD0 0F2 0OFFLOAD1 0RELOAD0 0F3"
    assert " ".join(found[7:]) == "0OFFLOAD2 0RELOAD1 0B0 0OFFLOAD3 0RELOAD2 0B1 0RELOAD3 0B2 0B3"
    assert offload(plan_of(ONE), False) == plan_of(ONE)


def test_more_than_can_be_is_refused_where_it_is_asked_for():
    plan = make_plan("dualpipe", 4, 8)
    assert offload(plan, 99) == offload(plan, 2) == offload(plan, 2, exact=True) != offload(plan, 1)
    with pytest.raises(PlanError, match="can the peak fall by more than 2 with 8 micro-batches: say 2, or that all"):
        offload(plan, 3, exact=True)
    with pytest.raises(PlanError, match="more than 0 with 1 micro-batches: leave it out"):
        offload(make_plan("1f1b", 1, 1), 1, exact=True)
    assert offload(plan, True, exact=True) == offload(plan, True)


def test_a_long_copy_gets_more_ops_to_hide_under():
    costs = CostModel(copy=1.5)
    assert offload(plan_of(ONE), True, costs).texts()[0][:6] == ["0F0", "0F1", "0F2", "0F3", "0B0", "0OFFLOAD3"]
    assert not offload(plan_of(ONE), True, CostModel(copy=9.0)).has_copies()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("micros", [2, 6, 13])
def test_every_schedule(schedule, micros):
    plan = make_plan(schedule, 4, micros)
    before = peak_activations(plan)
    for copy in (0.0, 0.5):
        costs = CostModel(copy=copy).for_placement(plan.placement)
        peaks = [before]
        for fewer in (1, 2, 3, True):
            moved = offload(plan, fewer, costs)
            assert moved.compute_only() == plan
            report = verify(moved)
            lowered = lower(moved)
            verify(lowered)
            assert lowered.unlowered() == moved and lowered.compute_only() == plan
            peaks.append(peak_activations(moved))
            assert list(report.peak_activations) == peaks[-1] == peak_activations(lowered)
            assert all(now <= last for now, last in zip(peaks[-1], peaks[-2], strict=True))
            assert all(now >= last - 1 for now, last in zip(peaks[-1], peaks[-2], strict=True)) or fewer is True
            assert makespan_of(moved, costs) == simulate(moved, costs).makespan >= makespan_of(plan, costs)
            assert makespan_of(moved, costs) <= makespan_of(plan, costs) + 1e-9, "copies shorter than an op hide"


def test_the_number_is_what_the_peak_falls_by():
    plan = make_plan("interleaved", 4, 16)
    peaks = [peak_activations(offload(plan, fewer)) for fewer in (False, 1, 2, 5)]
    assert peaks == [[11, 9, 7, 5], [10, 8, 6, 4], [9, 7, 5, 3], [6, 4, 3, 2]]
    assert not any(op.kind in COPIES for op in offload(make_plan("1f1b", 4, 16), 1).programs[1]), (
        "none that does not help"
    )
    few, everything = (sum(op.kind == OFFLOAD for op in offload(plan, n).programs[0]) for n in (1, True))
    assert 0 < few < everything / 2


def test_bytes_follow_stages():
    plan = offload(plan_of("0F0 0F1 0F2 0B0 0B1 0B2"), True)
    assert plan.texts() == [["0F0", "0F1", "0F2", "0B0", "0B1", "0B2"]]
    plan = offload(plan_of(ONE), True)
    assert peak_bytes(plan, CostModel(activation_bytes=(10,))) == [30]
    assert peak_bytes(plan_of(ONE), CostModel(activation_bytes=(10,))) == [40]


@pytest.mark.parametrize(
    ("row", "index", "said"),
    [
        ("0OFFLOAD0 0F0 0F1 0B0 0B1", 0, "it has not run forward"),
        ("0F0 0F1 0OFFLOAD0 0B0 0B1", 3, "its activation is in host memory, and has not been brought back"),
        ("0F0 0F1 0RELOAD0 0B0 0B1", 2, "its forward has run already"),
        ("0F0 0F1 0OFFLOAD0 0OFFLOAD0 0RELOAD0 0B0 0B1", 3, "in host memory"),
        ("0F0 0F1 0OFFLOAD0 0RELOAD0 0RELOAD0 0B0 0B1", 4, "brought back"),
        ("0F0 0F1 0OFFLOAD0 0RELOAD0 0OFFLOAD0 0B0 0B1", 4, "brought back"),
        ("0F0 0F1 0B0 0OFFLOAD0 0B1", 3, "finished"),
        ("0F0 0F1 0I0 0OFFLOAD0 0RELOAD0 0W0 0B1", 3, "it waits for W"),
        ("0F0 0F1 0OFFLOAD0 0B1", 4, "stage 0, micro-batch 0 has no RELOAD"),
    ],
)
def test_what_the_verifier_refuses(row, index, said):
    with pytest.raises(VerifyError, match=said) as caught:
        verify(plan_of(row))
    assert (caught.value.rule, caught.value.index) == (11, index)
    assert caught.value.__context__ is None  # a traceback shows this error alone


def test_a_cap_counts_what_is_on_the_device():
    moved = offload(plan_of(ONE), True)
    verify(moved, activation_cap=3)
    with pytest.raises(VerifyError, match="3 activations alive, the cap is 2"):
        verify(moved, activation_cap=2)


def test_a_late_copy_holds_its_backward_up():
    """F ends at 1; the copy out takes until 6 and holds up what follows OFFLOAD; the copy back takes 5 more."""
    plan = plan_of("0F0 0F1 0OFFLOAD0 0F2 0RELOAD0 0F3 0B0 0B1 0B2 0B3")
    costs = CostModel(copy=5.0)
    found = {str(span.op): (span.start, span.end) for span in simulate(plan, costs).spans}
    assert found["0OFFLOAD0"] == (1, 6)
    assert found["0F2"] == (6, 7)
    assert found["0RELOAD0"] == (7, 12)
    assert found["0B0"] == (12, 14)
    assert makespan_of(plan, UNIT) == 12 and makespan_of(plan, costs) == 20


def test_text():
    for kind in COPIES:
        op = Op(kind, 3, 7)
        assert Op.parse(str(op)) == op and atoms(op) == (op,)
    with pytest.raises(PlanError, match="says itself which activations"):
        offload(offload(plan_of(ONE), True), 1)
    assert {op.kind for op in lower(offload(plan_of(ONE), 1)).programs[0]} >= {OFFLOAD, RELOAD, "STEP"}
