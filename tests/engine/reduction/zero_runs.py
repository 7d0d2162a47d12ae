"""Training runs of the ZeRO tests, started on pooled ranks."""

from __future__ import annotations

import copy
from unittest.mock import patch

import torch
import training


def watched(config, ranks, replicas=1, steps=2):
    """Train, and look at the gradients whenever the tail has been called."""
    import dualpipe_engine
    from dualpipe_engine.schedule.op import REDUCE, STEP

    module = training.make_module(ranks, 2 * ranks, tied=False, replicas=replicas)
    replica = module._grid.data_parallel_id
    engine, *_ = dualpipe_engine.initialize(model=module, config=copy.deepcopy(config))
    tail, params = engine._tail, list(engine.module.parameters())
    held = {"accumulate": 0, "reduce": 0}
    log = []

    def watch(name, call):
        def watched_call(stage):
            call(stage)
            log.append((name, stage))
            own = tail.reduction._params.of_stage[stage]
            grads = (getattr(param, kind, None) for param in own for kind in ("grad", "grad_accum"))
            held[name] = max(held[name], sum(grad.numel() for grad in grads if grad is not None))

        return watched_call

    tail.accumulate = watch("accumulate", tail.accumulate)
    tail.reduce = watch("reduce", tail.reduce)
    losses = [float(engine.train_batch(training.stream(replica))) for _ in range(steps)]
    spans = engine._observer.spans()
    found = {
        "losses": losses,
        "held": held,
        "log": log[: len(log) // steps],
        "numel": sum(param.numel() for param in params),
        "tail": [str(span.op) for span in spans if span.op.kind in (REDUCE, STEP)],
        "reduction": type(tail.reduction).__name__,
        "left": sum(buffer.numel() for buffer in tail.reduction.buffers()),
    }
    engine.destroy()
    return found


def both_ways(config, ranks, replicas=1, steps=2, tied=True):
    """The same training with reductions under the tail, and with DeepSpeed's own after the schedule."""
    import dualpipe_engine
    from dualpipe_engine.engine.reduction import tail
    from dualpipe_engine.engine.reduction.after_schedule import AfterSchedule

    found = {}
    for name, choose in (("tail", tail.choose_reduction), ("after", AfterSchedule)):
        module = training.make_module(ranks, 2 * ranks, tied=tied, replicas=replicas)
        data = training.stream(module._grid.data_parallel_id)
        with patch.object(tail, "choose_reduction", choose):
            engine, *_ = dualpipe_engine.initialize(model=module, config=copy.deepcopy(config))
        losses = [float(engine.train_batch(data)) for _ in range(steps)]
        kind = type(engine._tail.reduction).__name__
        found[name] = {"losses": losses, "weights": training.weights(engine), "kind": kind}
        engine.destroy()
    return found


def half(config, ranks, steps, poisoned=None, tied=False):
    """fp16 training; `poisoned`: (step, rank) whose gradient overflows."""
    import dualpipe_engine

    module = training.make_module(ranks, 2 * ranks, tied=tied)
    engine, *_ = dualpipe_engine.initialize(model=module, config=copy.deepcopy(config))
    accumulate, data = engine._tail.accumulate if poisoned else None, training.stream(0)
    found = {"losses": [], "norms": [], "scales": [], "skipped": [], "digests": []}
    for step in range(steps):

        def poison(stage, step=step):
            if poisoned == (step, engine.place.rank):
                next(p for p in engine.module.parameters() if p.grad is not None).grad.fill_(float("inf"))
            accumulate(stage)

        if poisoned:
            engine._tail.accumulate = poison
        found["losses"].append(float(engine.train_batch(data)))
        found["norms"].append(float(engine.get_global_grad_norm()))
        found["scales"].append(float(engine._get_optimizer_loss_scale()))
        found["skipped"].append(engine.skipped_steps)
        digests = {name: training.digest(value) for name, value in training.weights(engine).items()}
        found["digests"].append(digests)
    found["weights"] = training.weights(engine)
    found["dtypes"] = {str(param.dtype) for param in engine.module.parameters()}
    engine.destroy()
    return found


def stock_half(config, blocks, steps):
    """Stock DeepSpeed with all stages on one rank."""
    return training.train(config, 1, blocks=blocks, steps=steps)


def finite(found):
    return all(torch.isfinite(value).all() for rank in found for value in rank["weights"].values())


def one_copy(dtype, travels, factors):
    """Reduced gradients of parameters without another copy, whether they lie where they did, and the same by a
    collective of one rank."""
    from types import SimpleNamespace

    import torch.distributed as dist

    from dualpipe_engine.engine.context import Scaling
    from dualpipe_engine.engine.reduction.all_reduce import AllReduce
    from dualpipe_engine.engine.reduction.side_stream import SideStream
    from dualpipe_engine.runtime.observer import Observer

    cpu = torch.device("cpu")
    found = []
    for reduce in (AllReduce._start, lambda it, params: it._start_bucket(dist.group.WORLD, params)):
        draw = torch.Generator().manual_seed(1)
        params = [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size in ((3, 5), (7,), (2,))]
        for param in params[:2]:  # the third has had no backward
            param.grad = torch.randn(param.shape, generator=draw).to(dtype)
        places = [param.grad.data_ptr() for param in params[:2]]
        reduction = AllReduce.__new__(AllReduce)
        reduction._sums, reduction._side_stream = {}, SideStream(cpu, Observer(0, cpu))
        groups = SimpleNamespace(copies=dist.group.WORLD)
        reduction._context = SimpleNamespace(scaling=Scaling(travels, *factors), groups=groups)
        reduce(reduction, params)
        reduction._side_stream.drain()
        stay = [param.grad.data_ptr() for param in params[:2]] == places
        found.append(([param.grad.contiguous() for param in params], stay))
    return found
