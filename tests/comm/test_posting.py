"""No plan of any generator deadlocks for the order in which its ranks post transfers, which is that of `Edges`."""

from __future__ import annotations

import random

import pytest
import torch
from posting import EACH, FIRST, NEED, POST, SEND, host_steps, is_stuck

from dualpipe_engine.comm.communicators import rounds_of
from dualpipe_engine.comm.meta import HEADER_BYTES, encode, flatten
from dualpipe_engine.comm.p2p import Edges
from dualpipe_engine.comm.queues import check_queues
from dualpipe_engine.errors import ConfigError, PlanError
from dualpipe_engine.schedule.op import COMPUTE, FB, RECV_B, RECV_F, SEND_B, SEND_F, W, atoms
from dualpipe_engine.schedule.orders.registry import KNOWN, SCHEDULES, placement_of
from dualpipe_engine.schedule.passes.lower import forward_only, lower
from dualpipe_engine.schedule.passes.verify import verify
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.search.under_cap import LEAST_CAP
from dualpipe_engine.schedule.timing.costs import CostModel

AHEAD = 1  # what GroupTransport sets without tags
KINDS = {  # of steps, and the rules for each; what finishes with few hardware queues does with more
    "a step": (
        {},
        {"one hardware queue": {"behind": 1}, "2 in flight": {"in_flight": 2}, "8 in flight": {"in_flight": 8}},
    ),
    "the first step": ({"headers": FIRST}, {"one hardware queue": {"behind": 1}, "3 in flight": {"in_flight": 3}}),
    "a step, pairs one after the other": ({"overlapped": False}, {"one hardware queue": {"behind": 1}}),
}


def plans(ranks, micros, optimize=False, stages=None):
    """Of every generator, or of those that take a number of stages a rank; each forward-only plan once."""
    for pp in ranks:
        for micro in micros:
            placements = {}
            for schedule in SCHEDULES:
                if stages is not None and KNOWN[schedule].with_stages is None:
                    continue
                try:
                    yield lower(make_plan(schedule, pp, micro, optimize=optimize, stages_per_rank=stages))
                except PlanError:
                    assert (schedule, pp % 2) == ("dualpipe", 1)
                    continue
                placement = placement_of(schedule, pp, stages)
                placements[placement] = lower(forward_only(placement, micro), train=False)
            yield from placements.values()


def capped(ranks, micros):
    """Of ZB-V under every cap."""
    for pp in ranks:
        for micro in micros:
            for cap in range(LEAST_CAP, 2 * pp):
                yield lower(make_plan("zbv", pp, micro, activation_cap=cap))


def steps_of(plan, ahead=AHEAD, **kind):
    return [host_steps(plan, rank, ahead, **kind) for rank in range(len(plan.programs))]


def kinds_of(plan):
    """See `KINDS`. Where shapes change, as they may in evaluation, not every plan makes do with one queue."""
    one_queue = {"one hardware queue": {"behind": 1}} if runs_on_one_queue(plan) else {}
    return KINDS | {"a step of any shapes": ({"headers": EACH}, {**one_queue, "8 in flight": {"in_flight": 8}})}


def runs_on_one_queue(plan):
    """Whether a plan does so where shapes change: evaluation, and what `check_queues` lets pass."""
    if all(op.is_forward for program in plan.programs for op in program if op.kind in COMPUTE):
        return True
    try:
        check_queues(plan, True, torch.device("cuda"), "1")
    except ConfigError:
        return False
    return True


def check(found):
    for plan in found:
        pairs = any(op.kind == FB for program in plan.programs for op in program)
        for name, (kind, rules) in kinds_of(plan).items():
            if not kind.get("overlapped", True) and not pairs:
                continue
            steps = steps_of(plan, **kind)
            for rule, kwargs in rules.items():
                stuck = is_stuck(steps, **kwargs)
                where = f"{plan.schedule}, {plan.placement}, {plan.num_micro} micro-batches"
                assert not stuck, f"{name}, {rule}: {where}: {stuck}"


def test_no_plan_is_stuck():
    check(plans((2, 3, 4, 8), (1, 2, 5, 12)))
    check(plans((2, 4), (3, 8), optimize=True))
    check(plans((2, 3), (2, 5), stages=3))
    check(capped((2, 4), (3, 8)))


@pytest.mark.parametrize(
    ("schedule", "pp", "micro", "cap"),
    [
        ("zbv", 16, 24, 30),
        ("zbv", 16, 38, 28),
        ("zbv", 14, 38, 24),
        ("zbv", 12, 31, 21),
    ],
)
def test_ranks_that_pass_on_to_each_other(schedule, pp, micro, cap):
    """They send more messages than the others have taken; a send or receive at its usual place would hold them."""
    check([lower(make_plan(schedule, pp, micro, activation_cap=cap))])


def test_pairs_that_send_later():
    """Orders that were shortened for long transfers: what a pair makes is not sent before its second half."""
    for pp, micro, costs in ((2, 4, CostModel(fb=2.4, comm=0.5)), (2, 24, CostModel(fb=2.2, comm=0.4))):
        check([lower(make_plan("dualpipe", pp, micro, costs, optimize=True))])


def drawn(seed):
    """The arguments of any plan of up to 16 ranks and 64 micro-batches: order, cap, costs and transfers are random."""
    draw = random.Random(seed)
    schedule = draw.choice(SCHEDULES)
    ranks = draw.randint(2, 16) // (2 if schedule == "dualpipe" else 1) * (2 if schedule == "dualpipe" else 1)
    stages = draw.choice([1, 2, 3, 4]) if KNOWN[schedule].with_stages else None
    f, i, w = (draw.choice([1.0, draw.uniform(0.3, 2)]) for _ in "fiw")
    fb = draw.choice([None, draw.uniform(max(f, i + w), f + i + w)])
    costs = CostModel(f, i, w, fb, draw.choice([0.0, 0.1, 0.3, 0.5]))
    return {
        "schedule": schedule,
        "num_ranks": max(ranks, 2),
        "num_micro": draw.randint(1, 64),
        "costs": costs.for_placement(placement_of(schedule, max(ranks, 2), stages)),
        "optimize": draw.random() < 0.5,
        "activation_cap": draw.choice([None, draw.randint(LEAST_CAP, 2 * ranks)]) if KNOWN[schedule].any_cap else None,
        "split_backward": draw.random() < 0.9,
        "stages_per_rank": stages,
    }


def check_drawn(seeds):
    for seed in seeds:
        found = drawn(seed)
        plan = lower(make_plan(**found))
        verify(plan, activation_cap=found["activation_cap"])
        check([plan])


def test_no_random_plan_is_stuck():
    check_drawn(range(20))


@pytest.mark.all
@pytest.mark.parametrize("start", range(1000, 3000, 100))
def test_no_plan_of_2000_random_ones_is_stuck(start):
    check_drawn(range(start, start + 100))


@pytest.mark.all
@pytest.mark.parametrize("pp", range(2, 17))
def test_no_plan_of_any_size_is_stuck(pp):
    check(plans([pp], range(1, 41)))
    for stages in (1, 3, 4):
        check(plans([pp], range(1, 41, 3 if pp <= 6 else 13), stages=stages))
    if pp <= 8:
        check(capped([pp], range(3, 41, 7)))
    else:
        check(capped([pp], [17]))
    if pp <= 6:
        check(plans([pp], range(1, 41, 6), optimize=True))


def test_the_model_sees_deadlocks():
    """A first message that is a rendezvous, receives posted as far ahead as the plan says, too few queues."""
    plan = lower(make_plan("dualpipe", 4, 8))
    ahead, far = steps_of(plan), steps_of(plan, None)
    assert is_stuck(far, rendezvous=True).keys() == {0, 1, 2, 3}
    assert is_stuck(ahead, rendezvous=True)
    assert is_stuck(far, behind=1)
    assert not is_stuck(far, behind=2)
    assert is_stuck(ahead, in_flight=1)
    assert is_stuck(steps_of(lower(make_plan("dualpipe", 2, 8)), None), in_flight=2)
    assert is_stuck(steps_of(plan, tensors=2), in_flight=2), "so messages of several tensors travel whole"
    assert is_stuck(steps_of(plan, headers=EACH), behind=1), "so changing shapes are refused with one queue"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_changing_shapes_are_refused_with_few_queues(schedule):
    plan = lower(make_plan(schedule, 2, 4))
    for device, changing, most in (("cuda", True, None), ("cuda", True, "8"), ("cuda", False, "1"), ("cpu", True, "1")):
        check_queues(plan, changing, torch.device(device), most)
    assert runs_on_one_queue(plan) == (schedule in ("1f1b", "zb1p"))
    if schedule == "dualpipe":
        with pytest.raises(ConfigError, match='"dualpipe" may wait for ever with CUDA_DEVICE_MAX_CONNECTIONS=1'):
            check_queues(plan, True, torch.device("cuda"), "1")


@pytest.mark.parametrize("pp", range(1, 17))
def test_connecting_is_no_circle(pp):
    """In each round a rank has one peer, which it shares; so the rounds finish one after the other."""
    for schedule in SCHEDULES:
        if schedule == "dualpipe" and pp % 2:
            continue
        edges = placement_of(schedule, pp).edges()
        rounds = rounds_of(edges)
        assert sorted(pair for each in rounds for pair in each) == sorted(edges)
        ring = (pp - 1, 0) in edges and pp > 2
        assert len(edges) == 2 * (pp - 1 + ring)
        assert len(rounds) <= 4 + 2 * (ring and pp % 2)
        assert ring == (pp > 2 and KNOWN[schedule].with_stages is not None)
        for pairs in rounds:
            assert len({rank for pair in pairs for rank in pair}) == 2 * len(pairs)


def test_a_ring_of_edges():
    for size in (3, 4, 5, 8):
        ring = [(a, (a + 1) % size) for a in range(size)]
        rounds = rounds_of([*ring, *[(b, a) for a, b in ring]])
        assert sum(map(len, rounds)) == 2 * size
        assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in rounds)
        assert len(rounds) <= 4 + 2 * (size % 2)


class Recorder:
    """A transport on which every transfer is done at once; it writes down what is asked of it."""

    def __init__(self, rank, ahead, whole, message):
        self.rank, self.ahead, self.whole, self.message = rank, ahead, whole, message
        self.steps = []
        self.counts = {}

    def send(self, tensor, dst, tag):
        self.steps.append((SEND, (self.rank, dst)))
        return _Done(self, None, 0)

    def recv(self, tensor, src, tag):
        edge = (src, self.rank)
        self.counts[edge] = self.counts.get(edge, 0) + 1
        self.steps.append((POST, edge))
        if tensor.numel() == HEADER_BYTES:
            tensor.copy_(encode(flatten(self.message)[1]))
        return _Done(self, edge, self.counts[edge])


class _Done:
    def __init__(self, transport, edge, count):
        self.transport, self.edge, self.count = transport, edge, count

    def wait(self, timeout_s):
        if self.edge is not None:
            self.transport.steps.append((NEED, self.edge, self.count))

    def done(self):
        return True


def run(edges, plan, rank, message):
    """What the executor asks of `edges` in one step in which stages pass on `message`."""
    placement = plan.placement

    def peer(op):
        step = 1 if op.kind in (SEND_F, RECV_B) else -1
        return placement.rank_of(op.stage + step, op.micro)

    remote = {op for op in plan.programs[rank] if op.kind in (RECV_F, RECV_B)}
    for op in plan.programs[rank]:
        if op.kind == SEND_F:
            edges.send_forward(op.stage, op.micro, message, peer(op))
        elif op.kind == SEND_B:
            edges.send_backward(op.stage, op.micro, list(message), peer(op))
        elif op.kind == RECV_F:
            edges.post_forward(op.stage, op.micro, peer(op))
        elif op.kind == RECV_B:
            edges.post_backward(op.stage, op.micro, peer(op))
        elif op.kind in COMPUTE:
            for part in atoms(op):
                if part.kind == "F" and part._replace(kind=RECV_F) in remote:
                    edges.wait_forward(part.stage, part.micro)
                elif part.kind not in ("F", W) and part._replace(kind=RECV_B) in remote:
                    edges.wait_backward(part.stage, part.micro)
    edges.flush()


@pytest.mark.parametrize(("ahead", "tensors", "whole"), [(0, 1, True), (1, 1, True), (1, 2, True), (None, 2, False)])
@pytest.mark.parametrize("changing", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_edges_keep_to_the_model(schedule, changing, ahead, tensors, whole):
    """Of a message that does not travel whole every tensor is waited for, which the model does with the last."""
    plan = lower(make_plan(schedule, 4, 6))
    message = tuple(torch.ones(1) for _ in range(tensors))
    for rank in range(4):
        transport = Recorder(rank, ahead, whole, message)
        edges = Edges(transport, torch.device("cpu"), dynamic_shape=changing)
        for headers in (EACH, EACH) if changing else (FIRST, None):
            run(edges, plan, rank, message)
            steps = host_steps(plan, rank, ahead, 1 if whole else tensors, headers)
            expected = [tuple(step) if step.act == NEED else step[:2] for step in steps]
            assert [step for step in transport.steps if step[0] != NEED] == [e for e in expected if e[0] != NEED]
            assert [step for step in transport.steps if step in expected] == expected
            assert edges.idle
            transport.steps, transport.counts = [], {}
