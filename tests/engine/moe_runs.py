"""Runs of the mixture-of-experts model, started on pooled ranks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import training
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

from dualpipe_engine.errors import ConfigError
from dualpipe_engine.models.config import MoEConfig
from dualpipe_engine.models.routing import Router
from dualpipe_engine.models.transformer import TokenEmbedding, layers, loss

SIZES = {"vocabulary": training.VOCABULARY, "hidden": 16, "heads": 2, "head": 8, "rotary": 4, "kv_rank": 8}


def config(**changes):
    return MoEConfig(**(SIZES | {"blocks": 4, "expert_inner": 8, "experts": 4, "expert_parallel": 2} | changes))


def make_module(model, ranks, replicas, **kwargs):
    topology = PipeDataParallelTopology(ranks, replicas)
    torch.manual_seed(7)
    replica = topology.get_coord(torch.distributed.get_rank()).data
    return PipelineModule(layers=layers(model, replica), topology=topology, **({"loss_fn": loss} | kwargs))


def set_routing(module, bias):
    """Push tokens to experts; one pushed away gets none."""
    for part in module.modules():
        if isinstance(part, Router) and bias is not None:
            part.bias.copy_(torch.tensor(bias))


def gradients(cases, ranks, replicas=2, micros=4):
    return [gradients_of(*case, ranks=ranks, replicas=replicas, micros=micros) for case in cases]


def gradients_of(
    model, schedule, bias=None, recompute=False, method="parameters", *, ranks, replicas, micros, **pipeline
):
    import dualpipe_engine

    kwargs = {"activation_checkpoint_interval": 1} if recompute else {}
    module = make_module(config(**model), ranks, replicas, partition_method=method, **kwargs).double()
    pipeline |= {"use_reentrant": False} if recompute else {}
    settings = training.settings(micros, replicas, zero=0, schedule=schedule, **pipeline)
    replica = module._grid.data_parallel_id
    engine, *_ = dualpipe_engine.initialize(model=module, config=settings)
    set_routing(engine.module, bias)
    start = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
    grads = {}

    def capture():
        grads.update({name: param.grad.clone() for name, param in engine.module.named_parameters()})

    engine._exec_optimizer_step = capture
    mean = float(engine.train_batch(training.stream(replica)))
    routers = {name: part for name, part in engine.module.named_modules() if isinstance(part, Router)}
    found = {
        "replica": replica,
        "start": start,
        "grads": grads,
        "loss": mean,
        "load": {name: router.load.clone() for name, router in routers.items()},
        "bias": {name: router.bias.clone() for name, router in routers.items()},
        "pairs": [span.op.kind for span in engine._observer.spans()].count("FB"),
        "transfers": sorted({transfer.name for transfer in engine._transfers}),
        "tables": [part.table.weight.data_ptr() for part in map(_layer_of, engine.module.forward_funcs) if part],
    }
    engine.destroy()
    return found


def _layer_of(function):
    """The embedding that a stage calls, also by a function bound to it."""
    found = function.args[0] if isinstance(function, partial) else function
    return found if isinstance(found, TokenEmbedding) else None


def train(model, settings, ranks, folder, replicas=2, steps=2):
    """Train, save, train on; then again from the saved state in a fresh engine with other weights."""
    import dualpipe_engine

    model = config(**model)
    replica = make_topology(ranks, replicas)

    def start():
        engine, *_ = dualpipe_engine.initialize(model=make_module(model, ranks, replicas), config=dict(settings))
        return engine

    engine, data = start(), training.stream(replica)
    before = training.weights(engine)
    losses = [float(engine.train_batch(data)) for _ in range(steps)]
    norm = engine.get_global_grad_norm()
    engine.save_checkpoint(folder)
    saved = training.weights(engine)
    losses += [float(engine.train_batch(data)) for _ in range(steps)]
    again = start()
    with torch.no_grad():
        for param in again.module.parameters():
            param.fill_(0.5)
    again.load_checkpoint(folder)
    data = training.stream(replica)
    for _ in range(steps * settings["gradient_accumulation_steps"]):
        next(data)
    loaded = training.weights(again)
    return {
        "replica": replica,
        "start": before,
        "losses": losses,
        "norm": float(norm),
        "same": all(torch.equal(saved[name], loaded[name]) for name in saved),
        "resumed": [float(again.train_batch(data)) for _ in range(steps)],
        "optimizer_bytes": training.optimizer_bytes(engine),
    }


def make_topology(ranks, replicas):
    return PipeDataParallelTopology(ranks, replicas).get_coord(torch.distributed.get_rank()).data


class Tokens:
    """A dataset of `(tokens, next tokens)`."""

    def __init__(self, rows):
        generator = torch.Generator().manual_seed(5)
        self._rows = torch.randint(0, training.VOCABULARY, (rows, training.LENGTH + 1), generator=generator)

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        return self._rows[index, :-1], self._rows[index, 1:]


def measured(path, ranks, replicas=2, steps=2, schedule="auto", **model):
    """Under "auto" the times of layers; then a start and some steps."""
    import dualpipe_engine
    from dualpipe_engine.engine.auto.layer_probe import measure_layers

    module = make_module(config(bias_rate=0.05, **model), ranks, replicas)
    replica, before = module._grid.data_parallel_id, {n: b.clone() for n, b in module.named_buffers()}
    seconds = measure_layers(module, next(training.stream(0)), repeats=1) if schedule == "auto" else None
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
    settings = training.settings(4, replicas, schedule=schedule, costs=str(path))
    engine, *_ = dualpipe_engine.initialize(model=module, config=settings, training_data=Tokens(16))
    stream = training.stream(replica)
    return {
        "seconds": seconds,
        "schedule": engine.plan.schedule,
        "losses": [float(engine.train_batch(stream)) for _ in range(steps)],
    }


def misplaced(ranks, replicas=2):
    """A start with layers that all ranks have built as those of replica 0, which each rank must refuse."""
    import dualpipe_engine

    topology = PipeDataParallelTopology(ranks, replicas)
    module = PipelineModule(layers=layers(config(), 0), topology=topology, loss_fn=loss)
    said = r"rank 1 is number 1 of the 2 ranks that share .* as number 0: pass its data-parallel rank as `replica`"
    with pytest.raises(ConfigError, match=said):
        dualpipe_engine.initialize(model=module, config=training.settings(4, replicas, schedule="dualpipe"))


def stock(ranks, replicas=2):
    """A start of DeepSpeed's own engine, which is refused."""
    import deepspeed

    settings = training.settings(4, replicas)
    with pytest.raises(ConfigError, match=r"shared by 2 ranks .* dualpipe_engine\.initialize"):
        deepspeed.initialize(model=make_module(config(), ranks, replicas), config=settings)
