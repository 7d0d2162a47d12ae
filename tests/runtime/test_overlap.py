"""Phases: the gradients stay, nothing is read before it has arrived, communication runs under computation."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_executor import ListFeed, check_against_oracle, make_stages, mean_square, run_plan
from torch import nn

from dualpipe_engine.comm.tickets import Tickets
from dualpipe_engine.errors import ConfigError
from dualpipe_engine.runtime.chunk import StageChunk
from dualpipe_engine.runtime.overlap import PhasedChunk, finish, interleave, phases_of
from dualpipe_engine.runtime.phases import COMM, COMPUTE, Phase, parts_with_parts
from dualpipe_engine.runtime.weight_grad import DeferredWeightGrads, install
from dualpipe_engine.schedule.op import FB
from dualpipe_engine.schedule.passes.lower import lower
from dualpipe_engine.schedule.search.make_plan import make_plan


class Arrival:
    """A transfer that delivers at `wait`; before, the receiver's memory holds NaN."""

    def __init__(self, source, target, events, name):
        self._source, self._target, self._events, self._name = source.clone(), target, events, name
        events.append(("post", name))

    def wait(self, timeout_s):
        with torch.no_grad():
            self._target.copy_(self._source)
        self._events.append(("wait", self._name))

    def done(self):
        return False

    def finished_at(self):
        return None

    def moments(self):
        return None


class Travel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, tickets, events, name):
        ctx.info = (tickets, events, name)
        return Travel.post(rows, *ctx.info)

    @staticmethod
    def backward(ctx, grad):
        tickets, events, name = ctx.info
        return Travel.post(grad, tickets, events, name + "'"), None, None, None

    @staticmethod
    def post(rows, tickets, events, name):
        out = torch.full_like(rows, float("nan"))
        ticket = Arrival(rows, out, events, name)
        if tickets is None:
            ticket.wait(0)
        else:
            tickets.add(ticket)
        return out


class Block(nn.Module):
    """Shaped like an expert-parallel block: the residual passes by while the rows travel."""

    def __init__(self, width=6):
        super().__init__()
        self.attention, self.experts = nn.Linear(width, width), nn.Linear(width, width)
        self.events = []

    def phases(self):
        return [
            Phase("attention", COMPUTE, self._attention),
            Phase("dispatch", COMM, partial(self._travel, name="dispatch")),
            Phase("experts", COMPUTE, self._experts),
            Phase("combine", COMM, partial(self._travel, name="combine")),
            Phase("add", COMPUTE, self._add),
        ]

    def _attention(self, x):
        self.events.append(("compute", "attention"))
        x = x + torch.tanh(self.attention(x))
        return {"residual": x, "rows": x * 2, "count": torch.tensor(x.shape[0]), "tag": "t"}

    def _travel(self, state, tickets, name):
        return state | {"rows": Travel.apply(state["rows"], tickets, self.events, name)}

    def _experts(self, state):
        self.events.append(("compute", "experts"))
        return state | {"rows": torch.relu(self.experts(state["rows"])) * state["count"]}

    def _add(self, state):
        return state["residual"] + state["rows"]

    def forward(self, x):
        for phase in self.phases():
            x = phase.run(x) if phase.kind == COMPUTE else phase.run(x, None)
        return x


@pytest.mark.parametrize("within", [False, True])
def test_a_layer_with_hooks_that_its_phases_pass_by_runs_whole(within):
    block = Block()
    block.attention = nn.Sequential(block.attention)
    hooked = block.attention if within else block
    assert len(phases_of([block])) == 5
    block.experts.register_forward_hook(lambda *_: None)  # is called by the phase
    assert len(phases_of([block])) == 5
    for register in ("forward_pre", "forward", "full_backward_pre", "full_backward"):
        handle = getattr(hooked, f"register_{register}_hook")(lambda *_: None)
        assert [phase.kind for phase in phases_of([block])] == [COMPUTE], register
        handle.remove()


def test_hooks_that_come_later_are_refused():
    block, ran = Block(), []
    block.attention = nn.Sequential(block.attention)
    chunk = PhasedChunk(block, 0, phases_of([block]), 10.0, parts=parts_with_parts(block), is_last=False)
    block.attention.register_forward_hook(lambda *_: ran.append(1))  # is called by the phase
    for micro in range(3):
        chunk.forward(micro, torch.randn(2, 6))
    assert len(ran) == 3
    block.register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match='"overlap": false'):
        chunk.forward(3, torch.randn(2, 6))


class Amiss(Block):
    """Its communication does what only a computation may do."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def _travel(self, state, tickets, name):
        if self.what == "twice":
            twice = [Travel.apply(state["rows"], tickets, self.events, name) for _ in range(2)]
            return state | {"rows": twice[0], "residual": twice[1]}
        return super()._travel(state | {"rows": self.experts(state["rows"])}, tickets, name)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    ("what", "text"), [("twice", r"uses a tensor twice.*\(x, x\)"), ("weight", "uses a parameter, which would get no")]
)
def test_communication_whose_backward_would_be_wrong_is_refused(what, text, split):
    block, store = Amiss(what), DeferredWeightGrads() if split else None
    if store is not None:
        install(block, store)
    with pytest.raises(ConfigError, match=f'the communication phase "dispatch" of stage 0 {text}'):
        phased(block, 0, is_last=False, store=store).forward(0, torch.randn(2, 6))


def phased(module, stage, recompute=False, **options):
    layers = list(module) if isinstance(module, nn.Sequential) else [module]
    return PhasedChunk(module, stage, phases_of(layers, lambda layer: recompute), 10.0, **options)


def stage_of(stage):
    return nn.Sequential(nn.Linear(6, 6), Block(), Block()) if stage % 2 else nn.Sequential(Block(), nn.Tanh())


def test_computation_that_nothing_separates_is_one_phase():
    block = Block()
    names = [phase.name for phase in phases_of([nn.Linear(6, 6), block, nn.Tanh(), block])]
    assert names == [
        "Linear+attention",
        "dispatch",
        "experts",
        "combine",
        "add+Tanh+attention",
        "dispatch",
        "experts",
        "combine",
        "add",
    ]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("split", [False, True], ids=["full", "split"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
@pytest.mark.parametrize(("ranks", "micros"), [(2, 5), (4, 10)])
def test_gradients_equal_one_process(schedule, ranks, micros, split, recompute):
    plan = lower(make_plan(schedule, ranks, micros))
    originals, copies = make_stages(plan.placement, stage_of)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(3, 6, dtype=torch.float64, generator=generator) for _ in range(micros)]
    feed = ListFeed(inputs, [-value for value in inputs])
    make = partial(phased, recompute=recompute)
    results, observers = run_plan(plan, copies, mean_square, feed, split=split, make=make)
    check_against_oracle(plan, originals, copies, mean_square, feed, results)
    pairs = sum(op.kind == FB for program in plan.programs for op in program)
    assert sum(span.op.kind == FB for observer in observers for span in observer.spans()) == pairs


def pair(split=True, recompute=False, kind=Block):
    """One F&B of two micro-batches on a stage; returns the block with its events, the transfers and what came out."""
    torch.manual_seed(0)
    block = kind().double()
    store = DeferredWeightGrads() if split else None
    if store is not None:
        install(block, store)
    log = []
    chunk = phased(block, 0, is_last=False, store=store, recompute=recompute, log=log)
    inputs = [torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    chunk.forward(0, inputs[0])
    block.events.clear()
    log.clear()
    output, grads = chunk.overlapped(1, inputs[1], None, chunk, 0, [torch.ones(3, 6, dtype=torch.float64)], 1.0)
    return block, log, inputs, output, grads


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_pair_equals_its_halves(split, recompute):
    block, _, inputs, output, grads = pair(split, recompute)
    oracle = Block().double()
    oracle.load_state_dict(block.state_dict())
    wanted, first = oracle(inputs[1].detach()), inputs[0].detach().requires_grad_()
    oracle(first).sum().backward()
    assert torch.equal(output, wanted) and torch.equal(grads[0], first.grad)
    for (name, param), other in zip(block.named_parameters(), oracle.parameters(), strict=True):
        assert torch.equal(param.grad, other.grad), name


def test_each_transfer_of_a_pair_is_under_a_computation_of_the_other_side():
    block, log, *_ = pair(recompute=True)  # recomputation makes the computations of the backward visible
    assert [" ".join(event) for event in block.events] == [
        "post combine'",
        "compute attention",
        "post dispatch",
        "wait combine'",
        "compute experts",  # again, for its backward
        "post dispatch'",
        "wait dispatch",
        "compute experts",
        "post combine",
        "wait dispatch'",
        "compute attention",  # again, for its backward
        "wait combine",
    ]
    assert sorted(transfer.name for transfer in log) == ["combine", "combine", "dispatch", "dispatch"]


class CountingBlock(Block):
    """A block whose rows may travel only when the host knows how many there are."""

    def phases(self):
        attention, *rest = super().phases()
        return [attention, Phase("counts", COMM, self._count), *rest]

    def _count(self, state, tickets):
        return state | {"counts": Travel.post(torch.ones(3), tickets, self.events, "counts")}


class QueueingBlock(CountingBlock):
    """The same where the host only queues."""

    def _count(self, state, tickets):
        state = super()._count(state, tickets)
        if tickets is not None:
            tickets.moments = lambda: [(None, None, None, None)]
        return state


class SilentBlock(CountingBlock):
    """The same where the dispatch itself counts, and holds the host for it, as DeepEP's."""

    def _count(self, state, tickets):
        return state


def test_where_nothing_was_posted_the_other_side_computes_first():
    block, *_ = pair(recompute=True, kind=SilentBlock)
    assert [" ".join(event) for event in block.events][:5] == [
        "post combine'",
        "compute attention",
        "wait combine'",
        "compute experts",  # again, for its backward
        "post dispatch",
    ]


def test_where_the_host_computes_what_leads_on_is_awaited_at_once():
    block, *_ = pair(recompute=True, kind=CountingBlock)
    assert [" ".join(event) for event in block.events][:6] == [
        "post combine'",
        "compute attention",
        "post counts",
        "wait counts",
        "post dispatch",
        "wait combine'",
    ]


def test_what_leads_on_is_awaited_under_a_computation_and_goes_on_before_the_other_side_posts():
    block, *_ = pair(recompute=True, kind=QueueingBlock)
    assert [" ".join(event) for event in block.events] == [
        "post combine'",
        "compute attention",
        "post counts",
        "wait combine'",
        "compute experts",  # again, for its backward
        "wait counts",
        "post dispatch",
        "post dispatch'",
        "wait dispatch",
        "compute experts",
        "post combine",
        "wait dispatch'",
        "compute attention",  # again, for its backward
        "wait combine",
    ]


def test_gradients_with_counts():
    block, _, inputs, output, grads = pair(kind=CountingBlock)
    oracle = Block().double()
    oracle.load_state_dict(block.state_dict())
    wanted, first = oracle(inputs[1].detach()), inputs[0].detach().requires_grad_()
    oracle(first).sum().backward()
    assert torch.equal(output, wanted) and torch.equal(grads[0], first.grad)


class KeepingBlock(Block):
    """A block that needs the rows that it sends here too."""

    def _travel(self, state, tickets, name):
        return super()._travel(state | {"kept": state["rows"]}, tickets, name)

    def _experts(self, state):
        return super()._experts(state | {"residual": state["residual"] + state["kept"]})


def test_what_travels_and_stays_gets_both_gradients():
    block, _, inputs, _, grads = pair(kind=KeepingBlock)
    oracle = KeepingBlock().double()
    oracle.load_state_dict(block.state_dict())
    first = inputs[0].detach().requires_grad_()
    oracle(first).sum().backward()
    torch.testing.assert_close(grads[0], first.grad)


def test_weight_gradients_fill_what_is_left_of_a_wait():
    torch.manual_seed(0)
    block = Block().double()
    store = DeferredWeightGrads()
    install(block, store)
    chunk = phased(block, 0, is_last=False, store=store)
    chunk.forward(0, torch.randn(3, 6, dtype=torch.float64, requires_grad=True))
    seen = {}

    class Watch(Tickets):
        def wait(self, timeout_s):
            seen[self._name] = block.experts.weight.grad is not None
            super().wait(timeout_s)

    for segment in chunk._segments[0]:
        segment.tickets.__class__ = Watch
    chunk.backward(0, [torch.ones(3, 6, dtype=torch.float64)])
    assert seen == {"combine": False, "dispatch": True}


def test_turns_depend_on_the_steps_alone():
    order = []

    def side(name, count):
        for number in range(count):
            order.append(f"{name}{number}")
            yield Tickets(f"{name}{number}")
        order.append(f"{name} ends")
        return name

    waited = []
    result = interleave(side("f", 3), side("b", 1), lambda tickets: waited.append(tickets._name))
    assert result == ("f", "b")
    assert order == ["b0", "f0", "b ends", "f1", "f2", "f ends"]
    assert waited == ["b0", "f0", "f1", "f2"]
    order.clear()
    assert interleave(side("f", 0), side("b", 2), lambda tickets: None) == ("f", "b")
    assert order == ["b0", "f ends", "b1", "b ends"]
    assert finish(side("x", 2), lambda tickets: None) == "x"


def test_a_phased_stage_pairs_only_with_its_like():
    block = Block()
    one, two = (phased(block, stage, is_last=False) for stage in (0, 1))
    plain = StageChunk(block, 2, is_last=False)
    off = phased(block, 3, is_last=False, overlap=False)
    assert one.pairs_with(two) and not one.pairs_with(plain) and not plain.pairs_with(one) and not off.pairs_with(one)


def test_a_failed_batch_leaves_nothing():
    chunk = phased(Block(), 0, is_last=False)
    chunk.forward(0, torch.randn(3, 6, requires_grad=True))
    chunk.clear()
    assert chunk.alive == 0 and not chunk._segments
