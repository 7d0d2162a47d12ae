"""A model with column- and row-parallel layers, and runs of it on pooled ranks.

The ranks of a slice group hold parts of matrices, and the same of everything else.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
import training
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.runtime.pipe.topology import (
    PipeDataParallelTopology,
    PipelineParallelGrid,
    PipeModelDataParallelTopology,
)
from torch import nn
from training import VOCABULARY, WIDTH, Embed, cross_entropy, head

from dualpipe_engine.engine.placing.param_groups import PLACEHOLDER


class _SumGradient(torch.autograd.Function):
    """Identity whose gradient is added up over the slices."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _SumOutput(torch.autograd.Function):
    """Sum over the slices, whose gradient each of them takes as it is."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Sliced(nn.Module):
    """A linear layer of which each rank of `mpu`'s slice group holds rows (`dim` 0) or columns (1) of the weight.

    Args:
        shares: sizes of the slices; None for equal ones.
    """

    def __init__(self, inputs, outputs, dim, mpu=None, shares=None):
        super().__init__()
        self.dim, self.group = dim, None if mpu is None else mpu.get_slice_parallel_group()
        whole = nn.Linear(inputs, outputs)
        number, count = (0, 1) if mpu is None else (mpu.get_slice_parallel_rank(), mpu.get_slice_parallel_world_size())
        sizes = shares or [whole.weight.shape[dim] // count] * count
        self.weight = nn.Parameter(whole.weight.detach().split(sizes, dim)[number].clone())
        self.bias = nn.Parameter(whole.bias.detach().split(sizes)[number].clone() if dim == 0 else whole.bias.detach())
        for param in [self.weight, self.bias] if dim == 0 else [self.weight]:
            param.model_parallel, param.slice_dim = True, dim

    def forward(self, x):
        if self.group is None:
            return nn.functional.linear(x, self.weight, self.bias)
        if self.dim == 0:
            return nn.functional.linear(_SumGradient.apply(x, self.group), self.weight, self.bias)
        return _SumOutput.apply(nn.functional.linear(x, self.weight), self.group) + self.bias


class Block(nn.Module):
    def __init__(self, mpu=None, shares=None, name=""):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = Sliced(WIDTH, 4 * WIDTH, 0, mpu, shares)
        self.down = Sliced(4 * WIDTH, WIDTH, 1, mpu, shares)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def build(ranks, slices, replicas=1, tied=True, double=False, shares=None, reentrant=None, named=False):
    """slices 0: whole layers in each process; `named`: arguments of layers differ from slice to slice."""
    topology, mpu = PipeDataParallelTopology(ranks, replicas), None
    if slices:
        topology = PipeModelDataParallelTopology(num_pp=ranks, num_mp=slices, num_dp=replicas)
        mpu = PipelineParallelGrid(topology=topology)
    table = {"tied_weight_attr": "weight"}
    first = TiedLayerSpec("embed", Embed, **table) if tied else LayerSpec(Embed)
    last = TiedLayerSpec("embed", Embed, forward_fn=head, **table) if tied else LayerSpec(nn.Linear, WIDTH, VOCABULARY)
    kwargs = {} if reentrant is None else {"activation_checkpoint_interval": 1, "checkpointable_layers": ["Block"]}
    if reentrant is False:
        kwargs["activation_checkpoint_func"] = checkpointing.non_reentrant_checkpoint
    name = f"slice {mpu.get_slice_parallel_rank()}" if named else ""
    torch.manual_seed(7)
    module = PipelineModule(
        layers=[first, *[LayerSpec(Block, mpu, shares, name) for _ in range(7)], nn.LayerNorm(WIDTH), last],
        topology=topology,
        loss_fn=cross_entropy,
        **kwargs,
    )
    return module.double() if double else module


def assemble(everyone):
    """Whole tensors of all ranks' (slice, {name: (tensor, dim of the cut or None)}); copies must agree to 1e-12."""
    found = {}
    for number, held in everyone:
        for name, (tensor, dim) in held.items():
            before = found.setdefault(name, (dim, {}))[1].setdefault(number if dim is not None else 0, tensor)
            torch.testing.assert_close(before, tensor, rtol=1e-12, atol=1e-14)
    return {
        name: parts[0] if dim is None else torch.cat([parts[i] for i in sorted(parts)], dim)
        for name, (dim, parts) in found.items()
    }


def gradients(schedule, ranks, slices, replicas=1, micros=3, **kwargs):
    """(relative error of the loss, largest relative error of a float64 gradient, what has none) against one process."""
    import dualpipe_engine

    module = build(ranks, slices, replicas, double=True, **kwargs)
    number = module._grid.get_slice_parallel_rank()
    config = training.settings(micros, replicas, zero=0, schedule=schedule)
    engine, *_ = dualpipe_engine.initialize(model=module, config=config)
    named = [(name, param) for name, param in engine.module.named_parameters() if name != PLACEHOLDER]

    def everywhere(of):
        held = {name: (of(param).detach().clone(), getattr(param, "slice_dim", None)) for name, param in named}
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (number, held))
        return assemble(everyone)

    start, found = everywhere(lambda param: param), {}
    engine._exec_optimizer_step = lambda: found.update(everywhere(lambda param: param.grad))
    loss = float(engine.train_batch(training.stream(engine.data_rank)))
    share = engine.weight_split.share if engine._store else 0.0
    engine.destroy()
    oracle = build(1, 0, dist.get_world_size(), double=True)
    oracle.load_state_dict(start)
    total = 0.0
    for replica in range(replicas):
        data = training.stream(replica)
        for _ in range(micros):
            inputs, labels = next(data)
            part = cross_entropy(oracle(inputs), labels) / (micros * replicas)
            part.backward()
            total += float(part.detach())
    expected = {name: param.grad for name, param in oracle.named_parameters()}
    worst = max((found[n] - grad).abs().max().item() / grad.abs().max().item() for n, grad in expected.items())
    return {"loss": abs(loss - total) / total, "worst": worst, "odd": found.keys() ^ expected.keys(), "share": share}


def many(cases):
    return {name: gradients(**case) for name, case in cases.items()}


def train(config, ranks, slices, replicas=1, steps=4, poisoned=None, **kwargs):
    """Train; `poisoned`: (step, global rank) whose first gradient overflows."""
    import dualpipe_engine

    module = build(ranks, slices, replicas, **kwargs)
    replica = module._grid.data_parallel_id
    engine, *_ = dualpipe_engine.initialize(model=module, config=copy.deepcopy(config))
    data = training.stream(replica)
    found = {"losses": [], "norms": [], "digests": [], "skipped": [], "class": type(engine).__name__}
    accumulate = engine._tail.accumulate if poisoned else None
    for step in range(steps):

        def poison(stage, step=step):
            if poisoned == (step, dist.get_rank()):
                next(p for p in engine.module.parameters() if p.grad is not None).grad.fill_(float("inf"))
            accumulate(stage)

        if poisoned:
            engine._tail.accumulate = poison
        found["losses"].append(float(engine.train_batch(data)))
        norm = engine.get_global_grad_norm()
        found["norms"].append(None if norm is None else float(norm))
        found["skipped"].append(engine.skipped_steps)
        found["digests"].append({name: training.digest(each) for name, each in training.weights(engine).items()})
    found["weights"], found["slice"] = training.weights(engine), engine.grid.get_slice_parallel_rank()
    found["eval"] = float(engine.eval_batch(training.stream(replica, seed=5)))
    engine.destroy()
    return found
