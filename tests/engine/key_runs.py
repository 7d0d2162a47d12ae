"""Short runs with keys of the DeepSpeed configuration."""

from __future__ import annotations

import contextlib
import gc
import io
import logging

import torch
from changed_runs import STEPS, Block, built, data, fill, mse, settings, weights
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.utils import logger, safe_get_full_fp32_param

ADAM = {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}}


class Buffered(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.scale.to(x.dtype)


def with_keys(config, keys):
    """The configuration with keys given by their paths."""
    config = dict(config)
    for path, value in keys.items():
        section = config
        *sections, last = path.split(".")
        for name in sections:
            section[name] = dict(section.get(name, {}))
            section = section[name]
        section[last] = value
    return config


def started(schedule, keys, layers=None, **more):
    import dualpipe_engine

    net = built(layers)
    fill(net)
    config = with_keys(settings(schedule, **more), keys)
    engine, *_ = dualpipe_engine.initialize(model=net, config=config, model_parameters=net.parameters())
    return engine


def stream_of(engine):
    dtype = next(engine.module.parameters()).dtype
    return ((inputs.to(dtype), labels) for inputs, labels in data())


def trained(schedule, variants, **more):
    """Train with each set of keys: name -> (losses, weights, dtypes of buffers)."""
    found = {}
    for name, keys in variants.items():
        engine = started(schedule, keys, [LayerSpec(Buffered) for _ in range(4)], **more)
        stream = stream_of(engine)
        losses = [float(engine.train_batch(stream)) for _ in range(STEPS)]
        dtypes = {buffer.dtype for buffer in engine.module.buffers()}
        found[name] = losses, {name: value.float() for name, value in weights(engine).items()}, dtypes
    return found


def fragments(variants):
    """For each set of keys, by how much what DeepSpeed finds of a parameter in its optimizer differs from it."""
    found = {}
    for name, keys in variants.items():
        engine = started("dualpipe", keys)
        engine.train_batch(stream_of(engine))
        pairs = [(safe_get_full_fp32_param(param), param) for param in engine.module.parameters()]
        found[name] = max(float((master - param).abs().max()) for master, param in pairs)
    return found


def reduced(variants):
    """As `trained`, on two replicas of two stages."""
    import dualpipe_engine

    found = {}
    for name, keys in variants.items():
        layers = [LayerSpec(Block) for _ in range(4)]
        net = PipelineModule(layers, num_stages=2, loss_fn=mse, partition_method="uniform")
        fill(net)
        config = with_keys(settings("dualpipe"), keys)
        engine, *_ = dualpipe_engine.initialize(model=net, config=config, model_parameters=net.parameters())
        engine.train_batch(data())
        found[name] = weights(engine)
    return found


def saved(folder, schedule, variants):
    """Save with each set of keys, then load and train, twice: name -> both losses."""
    found = {}
    for name, keys in variants.items():
        engine = started(schedule, keys, optimizer=ADAM, zero_optimization={"stage": 1})
        engine.train_batch(data())
        engine.save_checkpoint(f"{folder}/{name}")
        losses = []
        for _ in range(2):
            path, _ = engine.load_checkpoint(f"{folder}/{name}")
            assert path is not None
            losses.append(float(engine.train_batch(data())))
        found[name] = losses
    return found


class _Kept(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def written(keys):
    """What a run logs and prints, whether Python collects garbage in it, and the batches of a loader of 5 samples."""
    kept, out, level = _Kept(), io.StringIO(), logger.level
    logger.addHandler(kept)
    try:
        with contextlib.redirect_stdout(out):
            engine = started("dualpipe", keys)
            stream = data()
            for _ in range(2):
                engine.train_batch(stream)
        collects, found_level = gc.isenabled(), logger.level
    finally:
        logger.removeHandler(kept)
        logger.setLevel(level)
        gc.enable()
    loader = engine.deepspeed_io([(torch.zeros(4), torch.zeros(4))] * 5)
    return {
        "logged": "\n".join(kept.lines),
        "printed": out.getvalue(),
        "collects": collects,
        "level": found_level,
        "batches": len(loader),
    }
