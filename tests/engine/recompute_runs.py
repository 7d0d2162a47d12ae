"""Runs with modules that are computed again, started on pooled ranks."""

from __future__ import annotations

import moe_runs
import torch
import training
from torch import nn

#: Sizes at which activations outweigh everything else that a rank makes.
MODEL = {"q_rank": 8, "dense_blocks": 2, "blocks": 6, "expert_parallel": 1}
NAMES = ["norm", "activation", "attention.expand"]


class Dropping(nn.Module):
    """A layer with random numbers in a named part, and one that transfers."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(training.WIDTH, training.WIDTH)
        self.drop = nn.Sequential(nn.GELU(), nn.Dropout(0.3))
        self.down = nn.Linear(training.WIDTH, training.WIDTH)
        self.sum = Summing()

    def forward(self, x):
        return x + self.sum(self.down(self.drop(self.up(x))))


class Summing(nn.Module):
    def forward(self, x):
        total = x.detach().sum()
        torch.distributed.all_reduce(total, group=torch.distributed.group.WORLD)
        return x


def train(cases, ranks, replicas=1):
    """For each case losses and weights after two steps."""
    return {name: _train(ranks=ranks, replicas=replicas, **case) for name, case in cases.items()}


def _train(ranks, replicas, zero, schedule, model=None, micros=4, steps=2, precision="fp32", **pipeline):
    import dualpipe_engine

    module = moe_runs.make_module(moe_runs.config(**(MODEL | (model or {}))), ranks, replicas)
    config = training.settings(micros, replicas, zero=zero, schedule=schedule, precision=precision, **pipeline)
    replica = module._grid.data_parallel_id
    engine, *_ = dualpipe_engine.initialize(model=module, config=config)
    data = training.stream(replica)
    found = {
        "losses": [float(engine.train_batch(data)) for _ in range(steps)],
        "weights": {name: training.digest(value) for name, value in training.weights(engine).items()},
        "recomputed": sorted(engine.module.dualpipe_recomputed),
        "split": engine._store is not None,
        "transfers": len(engine._transfers),
    }
    engine.destroy()
    return found


def small(schedule="dualpipe", layers=Dropping, steps=2, ranks=2, **pipeline):
    """Losses and weights of a small model of other layers; every rank draws its own random numbers."""
    from deepspeed.pipe import PipelineModule

    import dualpipe_engine

    torch.manual_seed(3)
    module = PipelineModule([layers() for _ in range(4)], num_stages=ranks, loss_fn=nn.functional.mse_loss)
    config = training.settings(4, schedule=schedule, **pipeline)
    engine, *_ = dualpipe_engine.initialize(model=module, config=config)
    x = torch.ones(2, training.WIDTH)
    losses = [float(engine.train_batch(iter([(x, x)] * 4))) for _ in range(steps)]
    weights = training.weights(engine)
    engine.destroy()
    return losses, weights


def measure(folder):
    """Bytes of activations of each stage that "auto" measures without and with modules that are computed again."""
    import dualpipe_engine
    from dualpipe_engine.schedule.search.job_costs import Measurement

    found = []
    for wanted in (False, True):
        path = f"{folder}/{wanted}.json"
        module = moe_runs.make_module(moe_runs.config(**MODEL), 2, 1)
        config = training.settings(4, schedule="auto", costs=path, recompute=wanted)
        engine, *_ = dualpipe_engine.initialize(model=module, config=config, training_data=moe_runs.Tokens(16))
        engine.destroy()
        found.append(Measurement.load(path).costs.activation_bytes)
    return found


def chosen(folder):
    """What "auto" measures when nothing is said of "recompute", and, where memory is short, what it computes again and
    the losses beside those without."""
    from contextlib import suppress
    from dataclasses import replace

    import dualpipe_engine
    from dualpipe_engine.engine.auto.choose import choose
    from dualpipe_engine.engine.section import DualPipeConfig
    from dualpipe_engine.errors import PlanError
    from dualpipe_engine.schedule.search.job_costs import Measurement
    from dualpipe_engine.schedule.timing.costs import CostModel

    path = f"{folder}/costs.json"

    def start(**pipeline):
        module = moe_runs.make_module(moe_runs.config(**MODEL), 2, 1)
        config = training.settings(4, costs=path, **pipeline)
        engine, *_ = dualpipe_engine.initialize(model=module, config=config, training_data=moe_runs.Tokens(16))
        data = training.stream(0)
        found = engine.plan.schedule, sorted(engine.module.dualpipe_recomputed), float(engine.train_batch(data))
        engine.destroy()
        return found

    start(schedule="auto")
    measured = Measurement.load(path)
    tight = replace(
        measured,
        costs=CostModel(1, 1, 1, activation_bytes=20, copy=100),
        recomputed=CostModel(1, 1.1, 1, activation_bytes=10, copy=100),
        state_bytes=dict.fromkeys(measured.state_bytes, 100),
    )
    for memory in range(110, 200):
        tight = replace(tight, memory_bytes=memory)
        with suppress(PlanError):  # nothing fits yet
            config, _ = choose(DualPipeConfig(schedule="auto"), tight, 4)
            if config.recompute:
                break
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        tight.save(path)
    torch.distributed.barrier()
    again = start(schedule="auto")
    same = {name: getattr(config, name) for name in ("activation_cap", "stages_per_rank", "partition_method")}
    plain = start(schedule=again[0], **same)
    return measured, config.schedule, again, plain
