"""Steps of `DualPipe` and `DualPipeV` on pooled ranks, written the way code for DeepSeek's package is."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dualpipe_engine import DualPipe, DualPipeV, set_p2p_tensor_dtype, set_p2p_tensor_shapes
from dualpipe_engine.compat.weight_grad_store import WeightGradStore, run_backward
from dualpipe_engine.errors import PipelineRuntimeError

HIDDEN = 6
PUT = []


class LinearFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)

        def weight_gradient():
            weight.grad += grad.flatten(0, -2).T @ x.flatten(0, -2)

        if WeightGradStore.enabled:
            WeightGradStore.put(weight_gradient)
            PUT.append(1)
        else:
            weight_gradient()
        return grad @ weight, None


class OwnLinear(nn.Linear):
    def forward(self, x):
        return LinearFunc.apply(x, self.weight)


class Stage(nn.Module):
    """Plain layers: `nn.Linear` with biases and a norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class OwnStage(nn.Module):
    """Layers with `WeightGradStore`."""

    def __init__(self):
        super().__init__()
        self.up = OwnLinear(HIDDEN, 2 * HIDDEN, bias=False)
        self.down = OwnLinear(2 * HIDDEN, HIDDEN, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class OverlappedStage(OwnStage):
    """A stage that brings its own F&B, and gives lists and asserts what it is given."""

    pairs = 0

    @classmethod
    def overlapped_forward_backward(
        cls, module0, inputs0, criterion0, labels0, module1, loss1, outputs1, output_grads1
    ):
        cls.pairs += 1
        outputs0 = module0(*inputs0)
        outputs0 = [outputs0] if isinstance(outputs0, torch.Tensor) else outputs0
        loss0 = criterion0(*outputs0, *labels0) if criterion0 is not None else None
        assert criterion0 is not None or len(labels0) == 0
        if loss1 is not None:
            assert len(outputs1) == len(output_grads1) == 0
            loss1.backward()
            loss1.detach_()
        else:
            run_backward(outputs1, output_grads1)
        return outputs0, loss0


class LaterStage(OverlappedStage):
    """Leaves the weight gradients of its pairs in the store's queue."""

    @classmethod
    def overlapped_forward_backward(cls, *args):
        WeightGradStore.enabled = True
        try:
            return super().overlapped_forward_backward(*args)
        finally:
            WeightGradStore.enabled = False
            WeightGradStore.flush()


class TwoTensors(nn.Module):
    """Takes and gives a tensor to train on and one that needs no gradient."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x, scale):
        return torch.tanh(self.linear(x)) * scale, scale


def criterion(output, target):
    return F.mse_loss(output, target).clone()


def criterion_of_two(output, scale, target, weight):
    return ((output - target) * scale).pow(2).mean() + weight.sum()


STAGES = {each.__name__: each for each in (Stage, OwnStage, OverlappedStage, LaterStage, TwoTensors)}


def whole_model(kind, num_stages):
    torch.manual_seed(0)
    return nn.ModuleList([STAGES[kind]() for _ in range(num_stages)]).double()


def reference(model, inputs, labels, loss_fn, chunks, dim=0):
    """One process, one micro-batch after another: losses, outputs and (in `model`) gradients."""
    losses, outputs = [], []
    for micro in range(chunks):
        values = tuple(value.chunk(chunks, dim)[micro] for value in inputs)
        for stage in model:
            values = stage(*values)
            values = (values,) if isinstance(values, torch.Tensor) else values
        loss = loss_fn(*values, *(value.chunk(chunks, dim)[micro] for value in labels))
        if torch.is_grad_enabled():
            loss.backward()
        losses.append(loss.detach())
        outputs.append(values[0].detach())
    return torch.stack(losses), torch.cat(outputs, dim)


def batch(chunks, dim=0):
    generator = torch.Generator().manual_seed(1)
    shape = [3, 4, HIDDEN]
    shape[dim] *= chunks
    draw = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    return draw[0], draw[1]


def of_direction(tensor, chunks, direction, dim=0):
    """The micro-batches of one direction: the first half of the batch, and the second."""
    first = (chunks + 1) // 2 * (tensor.shape[dim] // chunks)
    return tensor.narrow(dim, 0, first) if direction == 0 else tensor.narrow(dim, first, tensor.shape[dim] - first)


def pipeline_stages(kind, model, stages):
    held = nn.Sequential(*(STAGES[kind]() for _ in stages)).double()
    for mine, stage in zip(held, stages, strict=True):
        mine.load_state_dict(model[stage].state_dict())
    return held


def worst_error(held, model, stages):
    """Largest relative error of a gradient."""
    pairs = [
        (param.grad, of.grad)
        for mine, stage in zip(held, stages, strict=True)
        for param, of in zip(mine.parameters(), model[stage].parameters(), strict=True)
    ]
    return max(float((grad - of).norm() / of.norm()) for grad, of in pairs)


def dualpipe(kind, chunks, dim=0, mapping=None, **options):
    """A training step, an inference step and another training step of `DualPipe`."""
    size = dist.get_world_size()
    rank = dist.get_rank() if mapping is None else mapping[dist.get_rank()]
    set_p2p_tensor_shapes([(3, 4, HIDDEN)])
    set_p2p_tensor_dtype(torch.float32)
    model, (x, y) = whole_model(kind, size), batch(chunks, dim)
    losses, outputs = reference(model, (x,), (y,), criterion, chunks, dim)
    stages = (rank, size - 1 - rank)
    held = pipeline_stages(kind, model, stages)
    pipe = DualPipe(held, batch_dim=dim, rank_mapping=mapping, **options)
    enters = {0: 0, size - 1: 1}.get(rank)
    mine, target = None, None
    if enters is not None:
        mine, target = of_direction(x, chunks, enters, dim), of_direction(y, chunks, 1 - enters, dim)
    PUT.clear()
    OverlappedStage.pairs = LaterStage.pairs = 0
    found = {"end": enters is not None}

    def compare(loss, output, wants_output, what):
        if enters is None:
            found[what] = loss is None and output is None
            return
        expected = of_direction(losses, chunks, 1 - enters)
        if not expected.numel():
            found[what] = loss is None and output is None
            return
        found[what] = torch.equal(loss, expected)
        if wants_output:
            found[what] &= torch.equal(output, of_direction(outputs, chunks, 1 - enters, dim))
        else:
            found[what] &= output is None

    def step(return_outputs):
        return pipe.step(mine, num_chunks=chunks, criterion=criterion, labels=(target,), return_outputs=return_outputs)

    compare(*step(False), False, "train")
    found["puts"], found["pairs"] = len(PUT), STAGES[kind].pairs if hasattr(STAGES[kind], "pairs") else 0
    pipe.sum_mirrored_gradients()
    found["error"] = worst_error(held, model, stages)
    found["digests"] = {
        stage: [float(param.grad.sum()) for param in each.parameters()]
        for stage, each in zip(stages, held, strict=True)
    }
    found["graph"] = any(param.grad.requires_grad for param in held.parameters())
    pipe.zero_grad()
    with torch.no_grad():
        compare(*step(True), True, "infer")
    found["clean"] = all(param.grad is None for param in held.parameters())
    compare(*step(True), True, "again")
    pipe.sum_mirrored_gradients()
    found["error_again"] = worst_error(held, model, stages)
    found["left"] = len(WeightGradStore.cache) + len(WeightGradStore.funcs_queue)
    return found


def dualpipev(kind, chunks, dim=0, mapping=None):
    """As `dualpipe`, with `DualPipeV`; labels as one tensor."""
    size = dist.get_world_size()
    rank = dist.get_rank() if mapping is None else mapping[dist.get_rank()]
    model, (x, y) = whole_model(kind, 2 * size), batch(chunks, dim)
    losses, outputs = reference(model, (x,), (y,), criterion, chunks, dim)
    stages = (rank, 2 * size - 1 - rank)
    held = pipeline_stages(kind, model, stages)
    pipe = DualPipeV((held[0], held[1]), dim, None, mapping)
    OverlappedStage.pairs = LaterStage.pairs = 0
    given = (x,) if rank == 0 else ()
    labels = y if rank == 0 else []
    found = {}

    def check(loss, output, wants_output):
        if rank:
            return loss is None and output is None
        return torch.equal(loss, losses) and (torch.equal(output, outputs) if wants_output else output is None)

    found["train"] = check(*pipe.step(*given, num_chunks=chunks, criterion=criterion, labels=labels), False)
    found["error"] = worst_error(held, model, stages)
    found["pairs"] = STAGES[kind].pairs if hasattr(STAGES[kind], "pairs") else 0
    with torch.no_grad():
        loss, output = pipe.step(*given, num_chunks=chunks, return_outputs=True)
        found["infer"] = loss is None and (output is None if rank else torch.equal(output, outputs))
        found["evaluate"] = check(*pipe.step(*given, num_chunks=chunks, criterion=criterion, labels=labels), False)
    return found


def tuples_and_shapes(chunks):
    """Two tensors in and out, labels of two kinds, and a smaller second batch; the input itself needs a gradient."""
    size, rank = dist.get_world_size(), dist.get_rank()
    model = whole_model("TwoTensors", 2 * size)
    stages = (rank, 2 * size - 1 - rank)
    held = pipeline_stages("TwoTensors", model, stages)
    pipe = DualPipeV(held)
    found = []
    for rows in (3, 1, 2):
        x, y = (value[: rows * chunks] for value in batch(chunks))
        scale, weight = x[:, :, :1].abs(), y[:, 0].abs()
        mine, whole = x.clone().requires_grad_(), x.clone().requires_grad_()
        losses, outputs = reference(model, (whole, scale), (y, weight), criterion_of_two, chunks)
        given = {"labels": (y, weight)} if rank == 0 else {}
        loss, output = pipe.step(
            *((mine, scale) if rank == 0 else (None, None)),
            num_chunks=chunks,
            criterion=criterion_of_two,
            return_outputs=True,
            **given,
        )
        good = worst_error(held, model, stages) < 1e-13
        if rank == 0:
            good &= torch.equal(loss, losses) and torch.equal(output[0], outputs) and torch.equal(output[1], scale)
            good &= float((mine.grad - whole.grad).norm() / whole.grad.norm()) < 1e-13
        found.append(good)
        pipe.zero_grad()
        model.zero_grad()
    return found


def subgroup(chunks):
    """Two pipelines of two ranks beside each other, each in its own process group and from right to left."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = groups[dist.get_rank() // 2]
    position = 1 - dist.get_rank() % 2
    model, (x, y) = whole_model("Stage", 2), batch(chunks)
    x = x + dist.get_rank() // 2
    losses, _ = reference(model, (x,), (y,), criterion, chunks)
    held = pipeline_stages("Stage", model, (position, 1 - position))
    pipe = DualPipe(held, process_group=group, rank_mapping=[1, 0])
    loss, _ = pipe.step(
        of_direction(x, chunks, position),
        num_chunks=chunks,
        criterion=criterion,
        labels=(of_direction(y, chunks, 1 - position),),
    )
    pipe.sum_mirrored_gradients()
    good = torch.equal(loss, of_direction(losses, chunks, 1 - position))
    return good, worst_error(held, model, (position, 1 - position))


def refused(what):
    """Each call must be refused with one clear error."""
    held = pipeline_stages("Stage", whole_model("Stage", 2), (0, 1))
    if what == "mapping":
        return DualPipe(held, rank_mapping=[0, 0])
    if what == "modules":
        return DualPipe(held[:1])
    if what == "odd":
        return DualPipe(held)
    pipe, (x, y) = DualPipe(held), batch(2)
    if what == "criterion":
        return pipe.step(x, num_chunks=2, labels=(y,))
    if what == "rows":
        return pipe.step(x, num_chunks=8, criterion=criterion, labels=(y,))
    return pipe.step(x, criterion=criterion, labels=(y,))


class Named(nn.Linear):
    def forward(self, x):
        return {"x": super().forward(x)}


def refused_values():
    """What a step of a pipeline of one rank says of inputs, labels, outputs and losses that are no tensors."""
    from dualpipe_engine.errors import ConfigError

    x, y = batch(2)
    plain, named = (DualPipeV([kind(HIDDEN, HIDDEN).double() for _ in range(2)]) for kind in (nn.Linear, Named))
    good = {"num_chunks": 2, "criterion": criterion, "labels": (y,)}
    said = []
    for pipe, inputs, changed in (
        (plain, [x], {}),
        (plain, torch.ones(()), {}),
        (plain, x, {"labels": 3}),
        (plain, x, {"num_chunks": 2.0}),
        (plain, x, {"criterion": lambda output, target: None}),
        (named, x, {}),
    ):
        try:
            pipe.step(inputs, **good | changed)
            said.append("")
        except ConfigError as error:
            said.append(str(error))
    loss, _ = plain.step(x, **good)
    return said, bool(loss.isfinite().all())


class Failing(nn.Linear):
    def forward(self, x):
        raise ValueError("no rows")


def lives_on(seconds):
    """Rank 1 fails in a step, catches its error and goes on; what each rank is told, after how long."""
    group = dist.new_group(timeout=timedelta(seconds=seconds))
    kind = nn.Linear if dist.get_rank() == 0 else Failing
    pipe = DualPipeV([kind(HIDDEN, HIDDEN), kind(HIDDEN, HIDDEN)], process_group=group)
    start = time.monotonic()
    try:
        pipe.step(torch.ones(2, HIDDEN), num_chunks=2, criterion=F.mse_loss, labels=[torch.ones(2, HIDDEN)])
    except (ValueError, PipelineRuntimeError) as error:
        said, took = str(error), time.monotonic() - start
    dist.barrier()
    return said, took
