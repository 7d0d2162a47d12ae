"""Runs of multi-token prediction, started on pooled ranks."""

from __future__ import annotations

import resource

import moe_runs
import torch
import torch.distributed as dist
import training

from dualpipe_engine.errors import CheckpointError
from dualpipe_engine.models import hf_weights
from dualpipe_engine.models.routing import Router


def gradients(cases, ranks, replicas, micros=4):
    """As `moe_runs.gradients`, of cases as dictionaries."""
    return [moe_runs.gradients_of(**case, ranks=ranks, replicas=replicas, micros=micros) for case in cases]


def start(model, schedule, ranks, replicas, load=None, **options):
    import dualpipe_engine

    config = moe_runs.config(**model)
    module = moe_runs.make_module(config, ranks, replicas)
    replica = module._grid.data_parallel_id
    if load is not None:
        for param in module.parameters():
            param.data.fill_(0.5)
        hf_weights.load(module, config, load)
    settings = training.settings(4, replicas, schedule=schedule, **options)
    engine, *_ = dualpipe_engine.initialize(model=module, config=settings)
    return config, engine, replica


def moved(model, folder, steps=2):
    """Train under DualPipe with shared experts, write the weights; read them for another cut and number of ranks."""
    config, engine, replica = start(model, "dualpipe", ranks=2, replicas=2)
    before = training.weights(engine)
    data = training.stream(replica)
    losses = [float(engine.train_batch(data)) for _ in range(steps)]
    hf_weights.save(engine.module, config, folder)
    found = {"replica": replica, "start": before, "losses": losses, "evaluated": float(engine.eval_batch(data))}
    next_loss = float(engine.train_batch(data))
    engine.destroy()
    _, engine, _ = start(model | {"expert_parallel": 1}, "zb1p", ranks=4, replicas=1, load=folder)
    streams = [training.stream(replica) for replica in range(2)]
    for data in streams:
        for _ in range(steps * 4):
            next(data)
    evaluated = [float(engine.eval_batch(data)) for data in streams]
    trained = float(engine.train_batch(streams[0]))
    engine.destroy()
    return found | {"next": next_loss, "read and evaluated": sum(evaluated) / 2, "read and trained": trained}


def saved(model, folder, written, zero=1):
    """Train with shared experts; a checkpoint, and the weights in the published format."""
    config, engine, replica = start(model, "dualpipe", ranks=2, replicas=2, zero=zero)
    engine.train_batch(training.stream(replica))
    engine.save_checkpoint(folder)
    hf_weights.save(engine.module, config, written)
    engine.destroy()


def saved_on_a_full_disk(model, folder, rank):
    """What ranks of two stages say where one of them cannot write its weights, or the index of all."""
    config = moe_runs.config(**model)
    module = moe_runs.make_module(config, ranks=2, replicas=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))  # the kernel refuses to let files grow
    try:
        hf_weights.save(module, config, folder)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return None


def low_precision(model):
    """What is in which dtype under bf16, and how often the busiest expert was chosen."""
    _, engine, replica = start(model, "dualpipe", ranks=2, replicas=1, precision="bf16")
    engine.train_batch(training.stream(replica))
    routers = [part for part in engine.module.modules() if isinstance(part, Router)]
    dtypes = {name: buffer.dtype for part in routers for name, buffer in part.named_buffers()}
    gate = routers[0].eval()(torch.randn(3, 16, dtype=torch.bfloat16)).weights.dtype
    moved = all(part.bias.abs().max() == torch.tensor(part.config.bias_rate) for part in routers)
    engine.destroy()
    return {"buffers": dtypes, "gate": gate, "weights": routers[0].weight.dtype, "biases moved": moved}
