"""Runs whose replicas share sequences, started on pooled ranks."""

from __future__ import annotations

import moe_runs
import pytest
import torch
import training
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

from dualpipe_engine.errors import ConfigError

LENGTH, IGNORED = 8, -100
MICROS = 4


def stream(reader):
    """Whole sequences of one group of replicas. Labels that count are spread unevenly, of each fourth micro-batch all
    in one part."""
    generator = torch.Generator().manual_seed(50 + reader)
    number = 0
    while True:
        tokens = torch.randint(0, training.VOCABULARY, (2, LENGTH + 1), generator=generator)
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = IGNORED
        labels[:, 0] = inputs[:, 0]
        if number % 4 == 1:
            labels[:, 2:] = IGNORED
        number += 1
        yield inputs, labels


def settings(size, readers, schedule, zero=0, **more):
    config = training.settings(MICROS, readers, zero=zero, schedule=schedule)
    if size > 1:
        config["sequence_parallel_size"] = size
    return config | more


def start(model, config, ranks, replicas, mesh_param=None, double=True):
    import dualpipe_engine

    module = moe_runs.make_module(moe_runs.config(**model), ranks, replicas)
    module = module.double() if double else module
    engine, *_ = dualpipe_engine.initialize(model=module, config=dict(config), mesh_param=mesh_param)
    return engine


def gradients(cases):
    return [gradients_of(**case) for case in cases]


def gradients_of(model, schedule, size, ranks=2, replicas=2):
    """The loss and all reduced gradients of one batch, and the loss of an evaluation."""
    engine = start(model, settings(size, replicas // size, schedule), ranks, replicas)
    begin = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
    evaluated = float(engine.eval_batch(stream(7)))
    with pytest.raises(ConfigError, match="gives the mean loss"):
        engine.eval_batch(stream(7), reduce_output=None)
    grads = {}

    def capture():
        grads.update({name: param.grad.clone() for name, param in engine.module.named_parameters()})

    engine._exec_optimizer_step = capture
    found = {
        "evaluated": evaluated,
        "loss": float(engine.train_batch(stream(engine.data_rank))),
        "replica": engine.place.replica,
        "reader": (engine.data_rank, engine.data_replicas, engine.train_batch_size()),
        "start": begin,
        "grads": grads,
    }
    engine.destroy()
    return found


def train(folder, steps, ways):
    """Losses of the same job, cut or not; the second half of each goes on from a checkpoint of the first one's.

    Args:
        ways: (sequence_parallel_size, mesh_param) of each.
    """
    model = {"expert_parallel": 1, "kv_heads": 1, "attention": "grouped", "bias_rate": 0.0}
    found = []
    for number, (size, mesh_param) in enumerate(ways):
        shared = size if mesh_param is None else mesh_param[1]
        # Two replicas that read one sequence each are as one that reads both: the same batch of 2 * MICROS sequences.
        readers = 2 // shared
        config = settings(size, readers, "dualpipe", zero=1)
        engine = start(model, config, 2, 2, mesh_param, double=False)
        data = _rows(engine.data_rank, readers)
        losses = [float(engine.train_batch(data)) for _ in range(steps)]
        if number == 0:
            engine.save_checkpoint(folder)
        engine.destroy()
        engine = start(model, config, 2, 2, mesh_param, double=False)
        engine.load_checkpoint(folder)
        losses += [float(engine.train_batch(data)) for _ in range(steps)]
        engine.destroy()
        found.append(losses)
    return found


def _rows(reader, readers):
    """The same sequences for any number of readers: each of two takes one row of a pair, one takes both."""
    generator = torch.Generator().manual_seed(9)
    rows = slice(None) if readers == 1 else slice(reader, reader + 1)
    while True:
        tokens = torch.randint(0, training.VOCABULARY, (2, LENGTH + 1), generator=generator)[rows]
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Data:
    """(tokens, next tokens)."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        row = torch.randint(0, training.VOCABULARY, (LENGTH + 1,), generator=torch.Generator().manual_seed(index))
        return row[:-1], row[1:]


def refusals():
    """What cannot work, each in its sentence; on every rank."""
    grouped = {"expert_parallel": 1, "attention": "grouped"}
    plain = settings(2, 1, "zb1p")
    cases = [
        (grouped, plain | {"sequence_parallel_size": 4}, "4 does not divide the 2 replicas"),
        (grouped, plain | {"data_parallel_size": 2}, "must be the 2 replicas"),
        (grouped, plain | {"sequence_parallel_size": "2"}, "whole number above 0"),
        (grouped | {"heads": 3, "head": 4}, plain, "3 attention heads cannot be divided"),
        (grouped | {"balancing": "loss"}, plain, "auxiliary losses"),
        (grouped | {"mtp_depth": 1}, plain, "mtp_depth, which looks beyond"),
        (grouped, plain | {"gradient_allreduce_op": "sum"}, 'take "mean"'),
        (grouped, plain | {"pipeline": {"schedule": "auto"}}, "name a schedule"),
    ]
    for model, config, text in cases:
        with pytest.raises(ConfigError, match=text):
            start(model, config, 2, 2)
    for mesh_param, text in (((1, 2, 1), "mesh_param must be"), ((2, 1), "contradicts")):
        with pytest.raises(ConfigError, match=text):
            start(grouped, plain, 2, 2, mesh_param)
    with pytest.raises(ConfigError, match="attention knows parts of sequences"):
        _without_attention(plain)


def _without_attention(config):
    import dualpipe_engine

    layers = [LayerSpec(torch.nn.Embedding, 17, 8), LayerSpec(torch.nn.Linear, 8, 17)]
    module = PipelineModule(layers, topology=PipeDataParallelTopology(2, 2), loss_fn=training.cross_entropy)
    dualpipe_engine.initialize(model=module, config=config)


def other_data():
    """Replicas that share sequences and read different ones."""
    engine = start({"expert_parallel": 1}, settings(2, 1, "zb1p"), 2, 2)
    with pytest.raises(ConfigError, match="share each sequence"):
        engine.train_batch(stream(engine.place.replica))
    engine.destroy()


def loader():
    """What `training_data` gives: all replicas of a sequence the same."""
    import dualpipe_engine

    module = moe_runs.make_module(moe_runs.config(expert_parallel=1), 2, 2)
    engine, *_ = dualpipe_engine.initialize(model=module, config=settings(2, 1, "dualpipe"), training_data=Data())
    return float(engine.train_batch()), engine.train_batch_size()
