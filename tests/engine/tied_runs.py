"""Layers of different classes that are tied by one weight and have more than it, on pooled ranks and in one process."""

from __future__ import annotations

from functools import partial

import torch
from changed_runs import STEPS, WIDTH, Block, Numbered, built, by_itself, data, settings, weights
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import nn


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, WIDTH * WIDTH).view(WIDTH, WIDTH))
        self.bias = nn.Parameter(torch.linspace(0, 1, WIDTH))

    def forward(self, x):
        return x @ self.weight + self.bias


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH, WIDTH))
        self.scale = nn.Parameter(torch.linspace(1, 2, WIDTH))

    def forward(self, x):
        return (x @ self.weight.t()) * self.scale


def tied(schedule, width=WIDTH):
    """The weight of the head is another at first; that of the table wins."""
    import dualpipe_engine

    torch.manual_seed(5)
    net = built([TiedLayerSpec("t", Table), LayerSpec(Block), LayerSpec(Block), TiedLayerSpec("t", Head)])
    with torch.no_grad():
        for part in net.modules():
            if isinstance(part, Block):
                part.a.weight.fill_(0.1)
                part.a.bias.fill_(0.2)
            if isinstance(part, Head):
                part.weight = nn.Parameter(torch.ones(width, WIDTH))
            if isinstance(part, Table):
                part.weight.copy_(Table().weight)
    engine, *_ = dualpipe_engine.initialize(model=net, config=settings(schedule), model_parameters=net.parameters())
    stream = data()
    return [float(engine.train_batch(stream)) for _ in range(STEPS)], weights(engine)


def expected():
    net = Numbered([Table(), Block(), Block(), Head()])
    for number in "12":
        net.get_submodule(number).a.weight.data.fill_(0.1)
        net.get_submodule(number).a.bias.data.fill_(0.2)
    first, last = net.get_submodule("0"), net.get_submodule("3")
    last.weight = first.weight
    losses = by_itself(net, torch.optim.SGD(net.parameters(), lr=0.1))
    return losses, {"weight": first.weight.detach(), "bias": first.bias.detach(), "scale": last.scale.detach()}


def heads():
    """Layers that share a weight of a table as objects: a module, a function bound to one, a part."""
    table, head = Table(), Head()
    head.weight = table.weight
    inner = nn.Sequential(table)
    return {"module": [table, table], "function": [table, partial(multiply, table)], "weight": [inner, head]}


def multiply(table, x):
    return x @ table.weight.t()


def shared(what, frozen=False, behind=False):
    """A weight that is shared without a tie, by layers of two stages, or with `behind` of one."""
    import dualpipe_engine

    torch.manual_seed(5)
    first, last = heads()[what]
    for part in (first, last):
        for param in part.parameters() if frozen and isinstance(part, nn.Module) else ():
            param.requires_grad_(False)
    between = [LayerSpec(Block), LayerSpec(Block)]
    net = built([first, last, *between] if behind else [first, *between, last])
    engine, *_ = dualpipe_engine.initialize(model=net, config=settings("zb1p"))
    loss = float(engine.train_batch(data()))
    engine.destroy()
    return loss
