"""Checkpoints of a model whose tied embedding has positions of its own, on ranks."""

from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import checkpoint_runs
import torch
import torch.distributed as dist
import training
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn


class Placed(training.Embed):
    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(training.LENGTH, training.WIDTH))

    def forward(self, tokens):
        return super().forward(tokens) + self.place


def start(schedule, zero, shared=False, universal=False):
    """An engine on all ranks; `shared`: layers of a tie share all that the first has, where one rank holds them."""
    import dualpipe_engine

    torch.manual_seed(7)
    layers = [
        TiedLayerSpec("embed", Placed, tied_weight_attr="weight"),
        *[LayerSpec(training.Block) for _ in range(4)],
        TiedLayerSpec("embed", Placed, forward_fn=training.head, tied_weight_attr="weight"),
    ]
    module = PipelineModule(layers, num_stages=dist.get_world_size(), loss_fn=training.cross_entropy)
    config = training.settings(4, zero=zero, schedule=schedule)
    if universal:
        config["checkpoint"] = {"load_universal": True}
    sharing = patch("dualpipe_engine.engine.placing.module._nothing_else", lambda *_: True)
    with sharing if shared else nullcontext():
        return dualpipe_engine.initialize(model=module, config=config)[0]


def told(engine):
    """The next loss, and the one behind it."""
    data = training.stream(0, seed=9)
    found = [float(engine.train_batch(data)) for _ in range(2)]
    engine.destroy()
    return found


def through_universal(folder):
    """Saved by ranks that hold a layer of the tie each, loaded by such that hold both: losses on either side."""
    engine = start("zb1p", 1)
    engine.train_batch(training.stream(0))
    engine.save_checkpoint(folder, tag="1")
    if dist.get_rank() == 0:
        checkpoint_runs.convert(Path(folder, "1"), Path(folder, "1u"))
    dist.barrier()
    there = told(engine)
    engine = start("dualpipe", 1, universal=True)
    engine.load_checkpoint(folder, tag="1u")
    return there, told(engine)


def of_shared(folder):
    """Saved without ZeRO by ranks where the layers of a tie share all: losses with and without a pause."""
    engine = start("dualpipe", 0, shared=True)
    engine.train_batch(training.stream(0))
    engine.save_checkpoint(folder, tag="1")
    there = told(engine)
    engine = start("dualpipe", 0)
    engine.load_checkpoint(folder, tag="1")
    return there, told(engine)
