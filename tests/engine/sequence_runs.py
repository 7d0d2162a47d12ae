"""Runs whose replicas share sequences, started on pooled ranks."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import moe_runs
import pytest
import torch
import training
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

from dualpipe_engine.errors import ConfigError
from dualpipe_engine.models import transformer
from dualpipe_engine.runtime import offload

LENGTH, IGNORED = 8, -100
MICROS = 4
WIDTH = moe_runs.config().hidden


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


def settings(size, readers, schedule, zero=0, precision="fp32", pipeline=None, **more):
    config = training.settings(MICROS, readers, zero, precision, schedule, **(pipeline or {}))
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


def gradients_of(model, schedule, size, ranks=2, replicas=2, pipeline=None):
    """The loss and all reduced gradients of one batch, and the loss of an evaluation."""
    engine = start(model, settings(size, replicas // size, schedule, pipeline=pipeline), ranks, replicas)
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
        "transfers": Counter(each.name for each in engine._transfers),
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


def losses(ways, steps=2):
    """Losses of the same job with whole sequences and with parts, for each way.

    Args:
        ways: a dict each of a `model` and of arguments of `settings`.
    """
    with mock.patch.object(offload, "LEAST", 0):  # everything that may leave does
        return [[_losses(size, steps, **way) for size in (1, 2)] for way in ways]


def _losses(size, steps, model=None, **given):
    readers = 2 // size
    model = {"expert_parallel": 1, "kv_heads": 1, "attention": "grouped", "bias_rate": 0.0} | (model or {})
    engine = start(model, settings(size, readers, **given), 2, 2, double=False)
    assert engine.plan.has_copies() == ("offload_activations" in given.get("pipeline", {}))
    data = _rows(engine.data_rank, readers)
    found = [float(engine.train_batch(data)) for _ in range(steps)]
    engine.destroy()
    return found


class Tempered(torch.nn.Module):
    """A loss that is a module, with a weight; the mean over labels."""

    def __init__(self):
        super().__init__()
        self.temperature = torch.nn.Parameter(torch.ones(1))

    def forward(self, output, labels):
        return transformer.loss(output * self.temperature, labels)


class Tileable(torch.nn.Module):
    """A loss that is a module, and can be had in tiles and of parts."""

    shifts = False

    def forward(self, output, labels):
        return transformer.loss(output, labels)

    def tiled(self, tiles):
        return transformer.loss.tiled(tiles)


def loss_modules(folder):
    """Losses, and the weight in the file of the loss, of whole sequences and of parts; losses in tiles."""
    import dualpipe_engine

    found = []
    model = moe_runs.config(expert_parallel=1, attention="grouped", bias_rate=0.0)
    for size, kind, pipeline in ((1, Tempered, {}), (2, Tempered, {}), (1, Tileable, {"tiled_loss": 2})):
        module = moe_runs.make_module(model, 2, 2, loss_fn=kind())
        config = settings(size, 2 // size, "dualpipe", pipeline=pipeline)
        engine, *_ = dualpipe_engine.initialize(model=module, config=config)
        data = _rows(engine.data_rank, engine.data_replicas)
        losses, kept = [float(engine.train_batch(data))], None
        if kind is Tempered:
            losses.append(float(engine.train_batch(data)))
            engine.save_checkpoint(folder, tag=f"{size}")
            kept = float(torch.load(f"{folder}/{size}/dualpipe_loss.pt")["temperature"])
        found.append((losses, kept))
        engine.destroy()
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
        (grouped, plain | {"gradient_allreduce_op": "sum"}, 'take "mean"'),
        (grouped, settings(2, 1, "zb1p", pipeline={"recompute": ["attention"]}), "transfers that are not to be"),
    ]
    for model, config, text in cases:
        with pytest.raises(ConfigError, match=text):
            start(model, config, 2, 2)
    for mesh_param, text in (((1, 2, 1), "mesh_param must be"), ((2, 1), "contradicts")):
        with pytest.raises(ConfigError, match=text):
            start(grouped, plain, 2, 2, mesh_param)
    with pytest.raises(ConfigError, match="attention knows parts of sequences"):
        start_layers([], plain)
    block = LayerSpec(transformer.DenseBlock, moe_runs.config(**grouped))
    with pytest.raises(ConfigError, match="LSTM mixes tokens"):
        start_layers([block, LayerSpec(torch.nn.LSTM, WIDTH, WIDTH)], plain)


def start_layers(layers, config):
    """An engine of an embedding, the given layers and a projection."""
    import dualpipe_engine

    ends = (
        LayerSpec(torch.nn.Embedding, training.VOCABULARY, WIDTH),
        LayerSpec(torch.nn.Linear, WIDTH, training.VOCABULARY),
    )
    topology = PipeDataParallelTopology(2, 2)
    module = PipelineModule([ends[0], *layers, ends[1]], topology=topology, loss_fn=training.cross_entropy)
    return dualpipe_engine.initialize(model=module, config=dict(config))[0]


class Mixing(torch.nn.Module):
    """Attention without parameters; `[batch, length, width]`."""

    def forward(self, x):
        return x + torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


class Knowing(Mixing):
    """Says that it knows parts."""

    def share_sequences(self, group):
        pass


def calls_of_attention():
    """A layer that calls torch's attention: refused in the first batch of either kind, before a step; not where a
    layer says that it knows parts."""
    block = LayerSpec(transformer.DenseBlock, moe_runs.config(attention="grouped", expert_parallel=1))
    for kind, train, refused in ((Mixing, True, True), (Mixing, False, True), (Knowing, True, False)):
        engine = start_layers([block, LayerSpec(kind)], settings(2, 1, "dualpipe"))
        begin = [param.detach().clone() for param in engine.module.parameters()]
        run = engine.train_batch if train else engine.eval_batch
        if refused:
            with pytest.raises(ConfigError, match="Mixing mixes tokens and does not know"):
                run(stream(0))
        else:
            assert float(run(stream(0))) > 0
        stepped = not all(map(torch.equal, begin, engine.module.parameters()))
        assert stepped == (not refused)
        engine.destroy()


def other_data():
    """Replicas that share sequences and read different ones."""
    engine = start({"expert_parallel": 1}, settings(2, 1, "zb1p"), 2, 2)
    with pytest.raises(ConfigError, match="share each sequence"):
        engine.train_batch(stream(engine.place.replica))
    engine.destroy()


def auto(path, data=True, **model):
    """Of "schedule": "auto" the loss of a first batch, which is that of the whole model if measuring has left it so;
    the schedule, and how often a rank has measured."""
    import dualpipe_engine
    from dualpipe_engine.engine.auto import choose

    config = settings(2, 1, "auto", pipeline={"costs": str(path), "optimize": False})
    module = moe_runs.make_module(moe_runs.config(bias_rate=0.0, **model), 2, 2).double()
    with mock.patch.object(choose, "probe_stages", wraps=choose.probe_stages) as probe:
        engine, *_ = dualpipe_engine.initialize(model=module, config=config, training_data=Data() if data else None)
    start = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
    found = {
        "schedule": engine.plan.schedule,
        "start": start,
        "measured": probe.call_count,
        "replica": engine.place.replica,
    }
    found["loss"] = float(engine.train_batch(stream(0)))
    engine.destroy()
    return found


def loader():
    """What `training_data` gives: all replicas of a sequence the same."""
    import dualpipe_engine

    module = moe_runs.make_module(moe_runs.config(expert_parallel=1), 2, 2)
    engine, *_ = dualpipe_engine.initialize(model=module, config=settings(2, 1, "dualpipe"), training_data=Data())
    return float(engine.train_batch()), engine.train_batch_size()
