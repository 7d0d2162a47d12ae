"""Lowering and the verifier: every generator's plans pass, every mutation that changes meaning is refused.

The judge of mutations is an independent brute force: tag-less FIFO edges on which a receive takes what comes next, a
rank that stops at an op whose input is missing, and a look at what each op got. A mutation changes meaning when that
run stops early, an op gets another op's tensor, a gradient is counted twice or never, weight gradients leave their
order, or the tail is incomplete. Swaps that merely make another correct schedule (two independent forwards, say) are
not errors, and the verifier must accept exactly those.
"""

from __future__ import annotations

from collections import deque

import pytest

from dualpipe_engine.errors import PlanError
from dualpipe_engine.schedule.op import Op, atoms
from dualpipe_engine.schedule.orders.registry import SCHEDULES
from dualpipe_engine.schedule.passes.lower import forward_only, lower
from dualpipe_engine.schedule.passes.verify import VerifyError, verify
from dualpipe_engine.schedule.placement import BIDIRECTIONAL, LINEAR, VEE, Placement
from dualpipe_engine.schedule.plan import Plan
from dualpipe_engine.schedule.search.make_plan import make_plan

SIZES = [(1, 1), (1, 3), (2, 1), (2, 2), (2, 5), (4, 1), (4, 3), (4, 8), (4, 11), (6, 12), (6, 25), (8, 20), (8, 7)]


def is_sound(plan: Plan, lowered: bool) -> bool:
    placement, last = plan.placement, plan.placement.num_stages - 1
    ranks = range(placement.num_ranks)
    at = [0 for _ in ranks]
    edges: dict[tuple[int, int], deque] = {}
    posted: dict[tuple[int, int], deque] = {}
    have = [set() for _ in ranks]  # tensors on a rank: (kind, made by stage, micro)
    ran = [[] for _ in ranks]
    waiting_w = [deque() for _ in ranks]

    def needs(part):
        kind, stage, micro, _ = part
        if kind == "F":
            return [("F", stage - 1, micro)] if stage else []
        if kind == "W":
            return []
        return [("F", stage, micro), *([("G", stage + 1, micro)] if stage < last else [])]

    def run(rank, op):
        kind, stage, micro, _ = op
        if kind in ("SEND_F", "SEND_B"):
            tensor = ("F" if kind == "SEND_F" else "G", stage, micro)
            if tensor not in have[rank]:
                return False
            target = stage + (1 if kind == "SEND_F" else -1)
            if not 0 <= target <= last:
                return False
            edges.setdefault((rank, placement.rank_of(target, micro)), deque()).append(tensor)
        elif kind in ("RECV_F", "RECV_B"):
            source = stage + (-1 if kind == "RECV_F" else 1)
            if not 0 <= source <= last:
                return False
            expected = ("F" if kind == "RECV_F" else "G", source, micro)
            posted.setdefault((placement.rank_of(source, micro), rank), deque()).append(expected)
        elif kind not in ("REDUCE", "STEP"):
            if any(need not in have[rank] for part in atoms(op) for need in needs(part)):
                return False
            for part in atoms(op):
                if part.kind == "W":
                    if not waiting_w[rank] or waiting_w[rank].popleft() != part[1:3]:
                        return False
                elif part.kind == "I":
                    waiting_w[rank].append(part[1:3])
                tensor = {"F": "F", "B": "G", "I": "G"}.get(part.kind)
                if tensor:
                    made = (tensor, part.stage, part.micro)
                    have[rank].add(made)
                    if not lowered:
                        for other in ranks:
                            have[other].add(made)
        ran[rank].extend(atoms(op))
        return True

    moved = True
    while moved:
        moved = False
        for rank in ranks:
            while at[rank] < len(plan.programs[rank]) and run(rank, plan.programs[rank][at[rank]]):
                at[rank] += 1
                moved = True
        for edge, expected in posted.items():
            while expected and edges.get(edge):
                got, want = edges[edge].popleft(), expected.popleft()
                if got != want:
                    return False
                have[edge[1]].add(got)
                moved = True
    if any(at[rank] < len(plan.programs[rank]) for rank in ranks) or any(map(len, edges.values())):
        return False
    return all(complete(plan, rank, ran[rank], lowered) for rank in ranks) and same_tail(plan, lowered)


def complete(plan, rank, ran, lowered):
    placement = plan.placement
    order = {op: index for index, op in enumerate(ran)}
    if len(order) != len(ran):
        return False
    for stage in placement.stages_of(rank):
        for micro in range(plan.num_micro):
            if placement.rank_of(stage, micro) != rank:
                continue
            place = {kind: order.get(Op(kind, stage, micro)) for kind in "FBIW"}
            if place["F"] is None or (place["B"] is None) == (place["I"] is None):
                return False
            if (place["I"] is None) != (place["W"] is None) or (place["I"] is not None and place["W"] < place["I"]):
                return False
            receive = order.get(Op("RECV_F", stage, micro))
            if receive is not None and receive > place["F"]:
                return False
    owned = {
        (s, m) for s in placement.stages_of(rank) for m in range(plan.num_micro) if placement.rank_of(s, m) == rank
    }
    if any(op.kind in "FBIW" and op[1:3] not in owned for op in ran):
        return False
    if any(op.kind == "FB" and op.parts[0].micro == op.parts[1].micro for op in plan.programs[rank]):
        return False
    for op in ran if lowered else ():
        if op.kind == "REDUCE":
            late = [o for o in ran[order[op] :] if o.kind in "BW" and o.stage == op.stage]
            if late:
                return False
    return not lowered or ran[-1].kind == "STEP"


def same_tail(plan, lowered):
    if not lowered:
        return True
    tails = {}
    for rank, program in enumerate(plan.programs):
        stages = plan.placement.stages_of(rank)
        tail = [op.stage for op in program if op.kind == "REDUCE"]
        if sorted(tail) != sorted(set(stages)) or tails.setdefault(frozenset(stages), tail) != tail:
            return False
    return True


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("optimize", [False, True])
def test_generated_plans_pass_lowered_and_not(name, optimize):
    for ranks, micros in SIZES:
        if name == "dualpipe" and ranks % 2:
            continue
        plan = make_plan(name, ranks, micros, optimize=optimize)
        verify(plan)
        lowered = lower(plan)
        report = verify(lowered, recv_buffers=2)
        assert max(report.peak_receives) <= 2
        assert lowered.compute_only() == plan
        assert is_sound(lowered, lowered=True)
        assert is_sound(plan, lowered=False)


def mutants(plan):
    """Every single deletion, duplication (right behind, and at the end) and swap of two positions of one rank."""
    for rank, program in enumerate(plan.programs):

        def replaced(new, rank=rank):
            programs = (*plan.programs[:rank], tuple(new), *plan.programs[rank + 1 :])
            return Plan(plan.placement, plan.num_micro, programs)

        for i, op in enumerate(program):
            yield True, f"delete {rank}:{i}", replaced((*program[:i], *program[i + 1 :]))
            yield True, f"repeat {rank}:{i}", replaced((*program[: i + 1], op, *program[i + 1 :]))
            yield True, f"again {rank}:{i}", replaced((*program, op))
            for j in range(i + 1, len(program)):
                swapped = list(program)
                swapped[i], swapped[j] = swapped[j], swapped[i]
                yield False, f"swap {rank}:{i},{j}", replaced(swapped)


@pytest.mark.parametrize(
    ("lowered", "micros", "many"),
    [(False, 8, 500), (True, 4, 400), pytest.param(True, 8, 1500, marks=pytest.mark.all)],
)
def test_every_mutation_that_changes_meaning_is_refused(lowered, micros, many):
    plan = make_plan("dualpipe", 4, micros)
    if lowered:
        plan = lower(plan)
    refused = accepted = 0
    for always_wrong, what, mutant in mutants(plan):
        try:
            verify(mutant)
            passed = True
        except VerifyError as error:
            passed = False
            assert 0 <= error.rank < 4
            assert f"rank {error.rank}" in str(error).splitlines()[0]
            assert error.reason in str(error)
            assert ">>" in str(error)
        if always_wrong:
            assert not passed, what
        else:
            assert passed == is_sound(mutant, lowered), what
        refused, accepted = refused + (not passed), accepted + passed
    assert refused > many
    assert accepted > 0


@pytest.mark.parametrize("name", [LINEAR, BIDIRECTIONAL, VEE])
def test_forward_only(name):
    for ranks in (2, 4, 6):
        for micros in (1, 2, 5, 12):
            plan = lower(forward_only(Placement(name, ranks), micros), train=False)
            verify(plan)
            assert {op.kind for program in plan.programs for op in program} <= {"F", "SEND_F", "RECV_F"}


def test_lowering_twice_is_refused():
    with pytest.raises(PlanError, match="lowered already"):
        lower(lower(make_plan("dualpipe", 4, 8)))


def test_twins_reduce_in_one_order_with_odd_micro_batches():
    for micros in (1, 2, 3, 5, 7, 9):
        plan = lower(make_plan("dualpipe", 4, micros))
        orders = [[op.stage for op in program if op.kind == "REDUCE"] for program in plan.programs]
        assert orders[0] == orders[3]
        assert orders[1] == orders[2]


def test_caps():
    plan = make_plan("dualpipe", 4, 8)
    report = verify(plan)
    verify(plan, activation_cap=max(report.peak_activations), pending_w_cap=max(report.peak_pending_w))
    with pytest.raises(VerifyError, match="rule 9"):
        verify(plan, activation_cap=max(report.peak_activations) - 1)
    with pytest.raises(VerifyError, match="rule 9"):
        verify(plan, pending_w_cap=max(report.peak_pending_w) - 1)
    with pytest.raises(VerifyError, match="rule 7"):
        verify(lower(plan), recv_buffers=0)


def test_a_cell_without_end_is_no_plan():
    with pytest.raises(PlanError, match="expected CSV with an op in each cell"):
        Plan.from_csv("0F0" * 100_000)


def test_a_pair_of_dependent_halves_cannot_run():
    text = "(0F0;0B1)FB,0F1,0B0\n1F0,1B0,1F1,1B1\n"
    with pytest.raises(VerifyError):
        verify(Plan.from_csv(text))
    # 1F0 feeds the backward 1B0 of the same pair
    with pytest.raises(VerifyError, match="rule 4"):
        verify(Plan.from_csv("0F0,0B0\n(1F0;1B0)FB\n"))


@pytest.mark.parametrize("text", ["0F0,0B0\n1F1,1B1\n", "0F0,0B0\n1F0,1F7,1B0\n", "0F0,(0F1;0W0)FB\n1F0\n"])
def test_what_no_plan_can_hold_is_not_lowered(text):
    programs = tuple(tuple(map(_op, row.split(","))) for row in text.split())
    with pytest.raises(PlanError, match="verify"):
        lower(Plan(Placement(LINEAR, 2), 2, programs))


def _op(text: str) -> Op:
    if text.startswith("("):
        forward, backward = map(Op.parse, text[1:-3].split(";"))
        return Op("FB", forward.stage, forward.micro, (forward, backward))
    return Op.parse(text)
