"""Runs of optimizers and schedulers, started on pooled ranks."""

from __future__ import annotations

import torch
import training
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau


def refused(cases):
    return training.refusals(_start, cases)


def _start(config, client=False, sparse=False):
    import dualpipe_engine

    layers = [
        LayerSpec(nn.Embedding, training.VOCABULARY, training.WIDTH, sparse=sparse),
        *[LayerSpec(training.Block) for _ in range(4)],
        LayerSpec(nn.Linear, training.WIDTH, training.VOCABULARY),
    ]
    module = PipelineModule(layers, num_stages=2, loss_fn=training.cross_entropy)
    optimizer = torch.optim.LBFGS(module.parameters()) if client else None
    engine, *_ = dualpipe_engine.initialize(model=module, optimizer=optimizer, config=config)
    return engine


def rates(schedulers, zero, precision="fp32"):
    """Losses of three steps and the learning rate behind each, under each scheduler."""
    import dualpipe_engine

    found = {}
    for name, scheduler in schedulers.items():
        config = training.settings(4, zero=zero, schedule="dualpipe", precision=precision) | {"scheduler": scheduler}
        module = training.make_module(2, 4)
        engine, _, _, made = dualpipe_engine.initialize(model=module, config=config)
        data, steps = training.stream(0), []
        for _ in range(3):
            steps.append((float(engine.train_batch(data)), engine.get_lr()[0], made.get_last_lr()[0]))
        engine.destroy()
        found[name] = steps
    return found


def plateau():
    """What is said of a ReduceLROnPlateau in the configuration and of the client's, and rates of one that is stepped by
    the client."""
    import dualpipe_engine
    from dualpipe_engine.errors import ConfigError

    config = training.settings(4, schedule="dualpipe")
    del config["scheduler"]
    named = config | {"scheduler": {"type": "ReduceLROnPlateau", "params": {"patience": 0}}}
    texts = []
    for each, given in [(named, None), (config, lambda optimizer: ReduceLROnPlateau(optimizer, patience=0))]:
        try:
            dualpipe_engine.initialize(model=training.make_module(2, 4), lr_scheduler=given, config=each)
        except ConfigError as error:
            texts.append(str(error))
    engine, *_ = dualpipe_engine.initialize(model=training.make_module(2, 4), config=config)
    scheduler, rates = ReduceLROnPlateau(engine.basic_optimizer, patience=0), []
    for loss in (1.0, 2.0):
        engine.train_batch(training.stream(0))
        scheduler.step(loss)
        rates += engine.get_lr()
    engine.destroy()
    return texts, rates


def without_optimizer(precisions):
    """The evaluated loss of an engine that has none, and what training says."""
    import dualpipe_engine
    from dualpipe_engine.errors import ConfigError

    found = {}
    for precision in precisions:
        config = training.settings(4, zero=0, schedule="dualpipe", precision=precision)
        del config["optimizer"], config["scheduler"]
        engine, *_ = dualpipe_engine.initialize(model=training.make_module(2, 4), config=config)
        loss = float(engine.eval_batch(training.stream(0)))
        try:
            engine.train_batch(training.stream(0))
        except ConfigError as error:
            found[precision] = loss, str(error)
        engine.destroy()
    return found
