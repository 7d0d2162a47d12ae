"""Runs under "schedule": "auto" that test_auto starts on pooled ranks."""

from __future__ import annotations

import copy
import gc

import torch
import training

import dualpipe_engine
from dualpipe_engine.engine.auto import choose as auto
from dualpipe_engine.engine.config import read_config


def start(path, ranks=4, replicas=1, data=True, schedule="auto", precision="fp32", **pipeline):
    """One start under the file `path`: the schedule taken, losses, and what measuring left behind."""
    config = training.settings(4, replicas, schedule=schedule, costs=str(path), precision=precision, **pipeline)
    module = training.make_module(ranks, 2 * ranks, replicas=replicas)
    before = {name: param.detach().clone() for name, param in module.named_parameters()}
    measured = []
    plain = auto.probe_stages

    def counted(*args, **kwargs):
        measured.append(1)
        state = torch.get_rng_state()
        found = plain(*args, **kwargs)
        assert torch.equal(state, torch.get_rng_state())
        assert all(param.grad is None for param in module.parameters())
        for name, param in module.named_parameters():
            assert torch.equal(param.float(), before[name].to(param.dtype).float()), name
        return found

    auto.probe_stages = counted
    try:
        engine, *_ = dualpipe_engine.initialize(
            model=module, config=copy.deepcopy(config), training_data=training.Rows() if data else None
        )
    finally:
        auto.probe_stages = plain
    stream = training.stream(engine.data_rank)
    found = {
        "schedule": engine.plan.schedule,
        "copies": engine.plan.has_copies(),
        "digest": engine.plan.digest(),
        "losses": [float(engine.train_batch(stream)) for _ in range(3)],
        "measured": len(measured),
        "layers": sorted(engine.module.dualpipe_layers),
    }
    engine.data_iterator = engine.training_dataloader = None
    gc.collect()
    return found


def described(path, ranks):
    """What the file of a job says that it was measured on."""
    config = training.settings(4, 1, schedule="auto", costs=str(path))
    module = training.make_module(ranks, 2 * ranks)
    return auto._describe(module, *read_config(config), auto._micro_size(config, 4, 1), 1)
