"""The executor on in-process ranks (threads, local transport) against one process that runs micro-batches in turn."""

from __future__ import annotations

import threading
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from dualpipe_engine.comm.p2p import Edges
from dualpipe_engine.comm.transport import LocalHub, LocalTransport
from dualpipe_engine.errors import PipelineRuntimeError
from dualpipe_engine.runtime.chunk import StageChunk
from dualpipe_engine.runtime.executor import BatchResult, Executor
from dualpipe_engine.runtime.observer import Observer
from dualpipe_engine.runtime.weight_grad import DeferredWeightGrads, install
from dualpipe_engine.schedule.passes.lower import forward_only, lower
from dualpipe_engine.schedule.plan import Plan
from dualpipe_engine.schedule.search.make_plan import make_plan

CPU = torch.device("cpu")


class ListFeed:
    def __init__(self, inputs, labels):
        self.all_inputs, self.all_labels = inputs, labels

    def inputs(self, micro):
        return self.all_inputs[micro]

    def labels(self, micro):
        return self.all_labels[micro]


def run_plan(
    plan: Plan, stages_of_rank, loss_fn, feed, *, train=True, split=False, dynamic=False, timeout=20.0, make=StageChunk
):
    """Run all ranks in threads; returns the results by rank and the executors' observers."""
    size = plan.placement.num_ranks
    hub = LocalHub(size)
    results: list[BatchResult | None] = [None] * size
    observers = [Observer(rank, CPU) for rank in range(size)]
    failures = []

    def work(rank):
        try:
            chunks = {}
            for stage, module in stages_of_rank[rank].items():
                store = None
                if split:
                    store = DeferredWeightGrads()
                    install(module, store)
                is_last = stage == plan.placement.num_stages - 1
                chunks[stage] = make(module, stage, is_last=is_last, loss_fn=loss_fn, store=store)
            edges = Edges(LocalTransport(hub, rank), CPU, timeout, dynamic)
            executor = Executor(rank, chunks, edges, observers[rank])
            with torch.set_grad_enabled(train):
                results[rank] = executor.run(plan, feed, train=train)
            assert edges.idle
            assert all(chunk.alive == 0 for chunk in chunks.values())
        except BaseException as error:
            failures.append((rank, error))
            hub.fail(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0][1]
    return results, observers


def make_stages(placement, make, dtype=torch.float64):
    """The same weights on every copy of a stage: rank -> stage -> module."""
    torch.manual_seed(0)
    originals = [make(stage).to(dtype) for stage in range(placement.num_stages)]
    copies: list[dict[int, nn.Module]] = []
    for rank in range(placement.num_ranks):
        held = {}
        for stage in placement.stages_of(rank):
            held[stage] = make(stage).to(dtype)
            held[stage].load_state_dict(originals[stage].state_dict())
        copies.append(held)
    return originals, copies


def mlp(stage):
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))


def mean_square(output, label):
    return (output - label).pow(2).mean()


def check_against_oracle(plan, originals, copies, loss_fn, feed, results):
    losses = {}
    for micro in range(plan.num_micro):
        value = feed.inputs(micro)
        for module in originals:
            value = module(value)
        loss = loss_fn(value, feed.labels(micro))
        loss.backward()
        losses[micro] = loss.detach()
    found = {micro: loss for result in results for micro, loss in result.losses.items()}
    assert found.keys() == losses.keys()
    for micro, loss in losses.items():
        torch.testing.assert_close(found[micro], loss, rtol=1e-12, atol=0)
    for stage, original in enumerate(originals):
        held = [copies[rank][stage] for rank in plan.placement.replicas(stage)]
        for name, param in original.named_parameters():
            grads = [dict(module.named_parameters())[name].grad for module in held]
            total = sum(grad for grad in grads if grad is not None)
            torch.testing.assert_close(total, param.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("split", [False, True], ids=["full", "split"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "dualpipe", "dualpipev", "zbv"])
@pytest.mark.parametrize(("ranks", "micros"), [(2, 1), (2, 2), (2, 5), (4, 3), (4, 8), (4, 11), (6, 12)])
def test_gradients_equal_one_process(schedule, ranks, micros, split):
    plan = lower(make_plan(schedule, ranks, micros))
    originals, copies = make_stages(plan.placement, mlp)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(3, 6, dtype=torch.float64, generator=generator) for _ in range(micros)]
    feed = ListFeed(inputs, [-value for value in inputs])
    results, observers = run_plan(plan, copies, mean_square, feed, split=split)
    check_against_oracle(plan, originals, copies, mean_square, feed, results)
    compute = plan.compute_only()
    for rank, observer in enumerate(observers):
        spans = observer.spans()
        flat = [part for op in compute.programs[rank] for part in (op.parts or (op,))]
        assert [span.op for span in spans if span.op.kind in "FBIW"] == flat
        assert all(span.start <= span.end for span in spans)


class Nested(nn.Module):
    """Tuples with bool and integer tensors, a constant, a float that needs no gradient and one that is not used."""

    def __init__(self, stage):
        super().__init__()
        self.stage = stage
        self.linear = nn.Linear(6, 6)

    def forward(self, value):
        if self.stage == 0:
            two = torch.full((1,), 2.0, dtype=value.dtype)
            value = (value, {"mask": value > 0, "count": torch.arange(3), "scale": two}, 7)
        x, extra, seven = value
        assert seven == 7
        assert extra["mask"].dtype == torch.bool
        assert extra["count"].tolist() == [0, 1, 2]
        x = self.linear(x) * extra["mask"] + x.cumsum(0) / extra["scale"]
        return (x, extra, seven) if self.stage < 3 else x


def test_nothing_of_a_run_outlives_it():
    plan = lower(make_plan("1f1b", 1, 1))
    stage, feed = nn.Linear(2, 2), ListFeed([torch.ones(1, 2)], [torch.zeros(1, 2)])
    chunk = StageChunk(stage, 0, is_last=True, loss_fn=nn.functional.mse_loss)
    executor = Executor(0, {0: chunk}, Edges(LocalTransport(LocalHub(1), 0), CPU), Observer(0, CPU))
    result = executor.run(plan, feed)
    assert list(result.losses) == [0]
    gone = [weakref.ref(feed), weakref.ref(result)]
    del feed, result
    assert [each() for each in gone] == [None, None], "the executor holds data or losses of a run that is over"


def test_nests_of_tensors_travel():
    plan = lower(make_plan("dualpipe", 4, 8))
    originals, copies = make_stages(plan.placement, Nested)
    inputs = [torch.randn(3, 6, dtype=torch.float64) for _ in range(8)]
    feed = ListFeed(inputs, inputs)
    results, _ = run_plan(plan, copies, mean_square, feed)
    check_against_oracle(plan, originals, copies, mean_square, feed, results)


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_inplace_first_layer_and_parameterless_stage(schedule):
    def make(stage):
        return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6)) if stage != 2 else nn.Sequential(nn.Flatten())

    plan = lower(make_plan(schedule, 4, 9))
    originals, copies = make_stages(plan.placement, make)
    inputs = [torch.randn(3, 6, dtype=torch.float64) for _ in range(9)]
    results, _ = run_plan(plan, copies, mean_square, ListFeed([x.clone() for x in inputs], inputs))
    check_against_oracle(plan, originals, copies, mean_square, ListFeed([x.clone() for x in inputs], inputs), results)


def test_dynamic_shapes():
    plan = lower(make_plan("dualpipe", 4, 8))
    originals, copies = make_stages(plan.placement, mlp)
    inputs = [torch.randn(1 + micro, 6, dtype=torch.float64) for micro in range(8)]
    feed = ListFeed(inputs, inputs)
    results, _ = run_plan(plan, copies, mean_square, feed, dynamic=True)
    check_against_oracle(plan, originals, copies, mean_square, feed, results)


def test_turn_of_the_vee_survives_inplace_layers():
    class Scale(nn.Module):
        def __init__(self, stage):
            super().__init__()
            self.stage, self.linear = stage, nn.Linear(6, 6)

        def forward(self, x):
            # In place on the input in the stage after the turn; the oracle does the same out of place.
            x = x.mul_(2.0) if self.stage == 2 and not oracle else x * 2.0 if self.stage == 2 else x
            return torch.tanh(self.linear(x))

    plan = lower(make_plan("dualpipev", 2, 5))
    originals, copies = make_stages(plan.placement, Scale)
    inputs = [torch.randn(3, 6, dtype=torch.float64) for _ in range(5)]
    feed = ListFeed(inputs, inputs)
    oracle = False
    results, _ = run_plan(plan, copies, mean_square, feed)
    oracle = True
    check_against_oracle(plan, originals, copies, mean_square, feed, results)


def test_changed_shape_names_the_remedy():
    plan = lower(make_plan("1f1b", 2, 2))
    _, copies = make_stages(plan.placement, mlp)
    inputs = [torch.randn(1 + micro, 6, dtype=torch.float64) for micro in range(2)]
    with pytest.raises(PipelineRuntimeError, match=r"dynamic_shape=True.*dataloader_drop_last"):
        run_plan(plan, copies, mean_square, ListFeed(inputs, inputs), timeout=2.0)


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipe", "dualpipev"])
def test_forward_only(schedule):
    placement = make_plan(schedule, 4, 5).placement
    plan = lower(forward_only(placement, 5), train=False)
    originals, copies = make_stages(placement, mlp)
    inputs = [torch.randn(3, 6, dtype=torch.float64) for _ in range(5)]
    results, _ = run_plan(plan, copies, None, ListFeed(inputs, inputs), train=False)
    outputs = {micro: value for result in results for micro, (value, _) in result.outputs.items()}
    for micro, value in enumerate(inputs):
        for module in originals:
            value = module(value)
        assert torch.equal(outputs[micro], value)


class Overlapping(nn.Sequential):
    """A stage with its own F&B, in the protocol of DeepSeek's DualPipe."""

    calls = 0

    @classmethod
    def overlapped_forward_backward(
        cls, module0, inputs0, criterion0, labels0, module1, loss1, outputs1, output_grads1
    ):
        cls.calls += 1
        output = module0(*inputs0)
        loss0 = criterion0(output, *labels0) if criterion0 is not None else None
        if loss1 is not None:
            loss1.backward()
        else:
            torch.autograd.backward(outputs1, output_grads1)
        return output, loss0


def test_own_overlapped_forward_backward_is_honoured():
    plan = lower(make_plan("dualpipe", 4, 8))
    pairs = sum(op.kind == "FB" for program in plan.programs for op in program)
    originals, copies = make_stages(plan.placement, lambda stage: Overlapping(nn.Linear(6, 6), nn.Tanh()))
    inputs = [torch.randn(3, 6, dtype=torch.float64) for _ in range(8)]
    feed = ListFeed(inputs, inputs)
    before = Overlapping.calls
    results, _ = run_plan(plan, copies, mean_square, feed)
    assert Overlapping.calls - before == pairs > 0
    check_against_oracle(plan, originals, copies, mean_square, feed, results)


def test_a_send_of_a_pair_may_stand_behind_it():
    """Where halves run one after the other the output leaves between them, unless the plan has moved its send."""
    plan = lower(make_plan("dualpipe", 4, 8))
    program = list(plan.programs[1])
    at = next(
        at
        for at, op in enumerate(program)
        if op.kind == "FB" and program[at + 1] == op.parts[0].send() and program[at + 2].kind in ("SEND_B", "RECV_F")
    )
    late, pair = program[at + 1], program[at]
    program[at + 1 : at + 3] = [program[at + 2], late]
    programs = (plan.programs[0], tuple(program), *plan.programs[2:])
    sent, send = [], Executor._send_forward

    def noting(self, op):
        if (op.stage, op.micro) == (late.stage, late.micro) and self._rank == 1:
            sent.append(self._edges.position.op)
        send(self, op)

    for each, expected in ((plan, [pair, late]), (replace(plan, programs=programs), [late])):
        sent.clear()
        originals, copies = make_stages(each.placement, mlp)
        feed = ListFeed(*([torch.randn(3, 6, dtype=torch.float64) for _ in range(8)] for _ in range(2)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Executor, "_send_forward", noting)
            results, _ = run_plan(each, copies, mean_square, feed)
        assert sent == expected
        check_against_oracle(each, originals, copies, mean_square, feed, results)


def test_frozen_first_stage():
    def make(stage):
        module = mlp(stage)
        if stage == 0:
            module.requires_grad_(False)
        return module

    plan = lower(make_plan("dualpipe", 4, 8))
    originals, copies = make_stages(plan.placement, make)
    inputs = [torch.randn(3, 6, dtype=torch.float64) for _ in range(8)]
    feed = ListFeed(inputs, inputs)
    results, _ = run_plan(plan, copies, mean_square, feed)
    for rank in plan.placement.replicas(0):
        assert all(param.grad is None for param in copies[rank][0].parameters())
    for original in originals:
        original.requires_grad_(True)
    originals[0].requires_grad_(False)
    losses = {micro: loss for result in results for micro, loss in result.losses.items()}
    assert len(losses) == 8
