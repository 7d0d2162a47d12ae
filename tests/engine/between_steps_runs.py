"""What changes while a model trains: what is trained, buffers, parameters of the loss."""

from __future__ import annotations

import zlib

import torch
from changed_runs import BLOCKS, STEPS, WIDTH, Block, Numbered, built, by_itself, data, fill, mse, settings, weights
from deepspeed.pipe import LayerSpec
from torch import nn


def flip(net, on):
    for name, param in net.named_parameters():
        if name.split(".")[0] in ("0", "3"):
            param.requires_grad_(on)


def optimizer_of(kind, params):
    if kind == "sgd":
        return torch.optim.SGD(params, lr=0.1)
    return torch.optim.AdamW(params, lr=0.05, weight_decay=0.1)


OPTIMIZERS = {
    "sgd": {"type": "SGD", "params": {"lr": 0.1}},
    "adam": {"type": "AdamW", "params": {"lr": 0.05, "weight_decay": 0.1, "torch_adam": True}},
}
FLIPS = [("sgd", True), ("adam", True), ("adam", False)]


def flipped(schedule):
    """Layers are frozen or unfrozen after the first step; with Adam too, whose momentum would move what is frozen."""
    import dualpipe_engine

    found = {}
    for kind, on in FLIPS:
        net = built()
        fill(net)
        if on:
            flip(net, False)
        config = settings(schedule, optimizer=OPTIMIZERS[kind])
        engine, *_ = dualpipe_engine.initialize(model=net, config=config, model_parameters=net.parameters())
        stream = data()
        losses = [float(engine.train_batch(stream))]
        flip(engine.module, on)
        losses += [float(engine.train_batch(stream)) for _ in range(2)]
        found[kind, on] = losses, {n: value for n, value in weights(engine).items() if "nothing" not in n}
    return found


def expected_of_flips(kind, on):
    net = Numbered([Block() for _ in range(BLOCKS)])
    fill(net)
    if on:
        flip(net, False)
    optimizer, stream = optimizer_of(kind, net.parameters()), data()
    losses = by_itself(net, optimizer, 1, stream)
    flip(net, on)
    losses += by_itself(net, optimizer, 2, stream)
    return losses, {name: param.detach() for name, param in net.named_parameters()}


def flipped_with_zero():
    import dualpipe_engine

    net = built()
    config = settings("dualpipe", zero_optimization={"stage": 1})
    engine, *_ = dualpipe_engine.initialize(model=net, config=config, model_parameters=net.parameters())
    stream = data()
    engine.train_batch(stream)
    flip(engine.module, False)
    engine.train_batch(stream)


class Moving(Block):
    """Writes a buffer in its forward: what it has seen, or a table that does not depend on it."""

    def __init__(self, table):
        super().__init__()
        self.table = table
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x):
        self.seen = torch.ones(WIDTH) if self.table else self.seen + x.detach().sum(0)
        return super().forward(x) * (1.0 if self.table else 0.5)


class Normed(Block):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return super().forward(self.bn(x))


def with_buffers(schedule, kinds):
    import dualpipe_engine

    losses = None
    for kind in kinds:
        spec = LayerSpec(Normed) if kind == "bn" else LayerSpec(Moving, kind == "table")
        net = built([spec, *[LayerSpec(Block) for _ in range(3)]])
        fill(net)
        engine, *_ = dualpipe_engine.initialize(model=net, config=settings(schedule), model_parameters=net.parameters())
        stream = data()
        losses = [float(engine.train_batch(stream)) for _ in range(STEPS)]
    return losses, {name: buffer.clone() for name, buffer in engine.module.named_buffers()}


class Weighted(nn.Module):
    """A loss with a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, output, labels):
        return mse(output * self.scale, labels)


def trained_loss(schedule, zero):
    import dualpipe_engine

    net = built(loss_fn=Weighted())
    fill(net)
    config = settings(schedule, zero_optimization={"stage": zero})
    engine, *_ = dualpipe_engine.initialize(model=net, config=config, model_parameters=net.parameters())
    stream = data()
    losses = [float(engine.train_batch(stream)) for _ in range(STEPS)]
    return losses, weights(engine), engine.reads_labels


def expected_of_trained_loss():
    net = Numbered([Block() for _ in range(BLOCKS)])
    loss_fn = Weighted()
    both = nn.ModuleDict({"net": net, "loss_fn": loss_fn})
    fill(net)
    generator = torch.Generator().manual_seed(zlib.crc32(b"loss_fn.scale"))
    loss_fn.scale.data.copy_(torch.randn(WIDTH, generator=generator) * 0.3)
    losses = by_itself(net, torch.optim.SGD(both.parameters(), lr=0.1), loss_fn=loss_fn)
    return losses, dict(net.named_parameters()) | {"loss_fn.scale": loss_fn.scale}
