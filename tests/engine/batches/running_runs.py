"""What the user changes of a PipelineModule after `initialize`."""

from __future__ import annotations

from functools import partial

import torch
from changed_runs import Block, built, data, fill, mse, settings
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn

calls = [0]


class Counted(Block):
    def forward(self, x):
        calls[0] += 1
        return super().forward(x)


class Halved(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 0.5 * self.inner(x)


class Reporting(PipelineModule):
    """Its forward reads an attribute, and writes one that it reports and one that it takes back."""

    gain = 1.0

    def forward(self, x):
        self.seen = x
        x = super().forward(x) * self.gain
        del self.seen
        self.largest = x.detach().abs().max()
        return x

    def get_additional_losses(self):
        return {"largest": self.largest}


def loss(net):
    net.loss_fn = lambda output, labels: 3 * mse(output, labels)


def layer(net):
    if "3" in net.fwd_map:
        index = net.fwd_map["3"]
        net.forward_funcs[index] = Halved(net.forward_funcs[index])


def interval(net):
    net.set_checkpoint_interval(0 if net.activation_checkpoint_interval else 1)


class Louder(Reporting):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = 1.5


def gain(net):
    net.gain = 0.5


def no_gain(net):
    del net.gain


CHANGES = {
    "loss": (loss, {}),
    "layer": (layer, {}),
    "computed again": (interval, {}),
    "kept": (interval, {"activation_checkpoint_interval": 1}),
    "attribute": (gain, {"kind": Reporting}),
    "no attribute": (no_gain, {"kind": Louder}),
}


def changed(schedule):
    """Change -> losses before and after it, that of an evaluation, forwards of all ranks, what the module reports."""
    import dualpipe_engine

    found = {}
    for name, (change, options) in CHANGES.items():
        options = dict(options)
        kind = options.pop("kind", PipelineModule)
        layers = [LayerSpec(Counted) for _ in range(4)]
        net = kind(layers, num_stages=2, loss_fn=mse, partition_method="uniform", **options)
        fill(net)
        config = settings(schedule)
        if schedule is None:
            del config["pipeline"]
        engine, *_ = dualpipe_engine.initialize(model=net, config=config, model_parameters=net.parameters())
        stream, losses = data(), []
        losses.append(float(engine.train_batch(stream)))
        change(engine.module)
        losses.append(float(engine.eval_batch(data(1))))
        calls[0] = 0
        losses += [float(engine.train_batch(stream)) for _ in range(2)]
        forwards = torch.tensor(calls[0])
        torch.distributed.all_reduce(forwards)
        reported = {key: float(value) for key, value in (engine.agg_additional_losses or {}).items()}
        found[name] = losses, int(forwards), reported
    return found


def refused():
    """What changes that cannot be followed are answered with; the engine goes on with what it had."""
    import dualpipe_engine
    from dualpipe_engine.errors import ConfigError

    net = built([LayerSpec(nn.BatchNorm1d, 4), *[LayerSpec(Block) for _ in range(3)]])
    engine, *_ = dualpipe_engine.initialize(model=net, config=settings("dualpipev"), model_parameters=net.parameters())
    said, functions = [], list(net.forward_funcs)
    for change, back in (
        (lambda: net.forward_funcs.append(nn.Identity()), lambda: net.forward_funcs.pop()),
        (lambda: interval(net), lambda: interval(net)),
        (lambda: setattr(net, "forward", partial(type(net).forward, net)), lambda: delattr(net, "forward")),
    ):
        change()
        try:
            engine.train_batch(data())
        except ConfigError as error:
            said.append(str(error))
        back()
    assert net.forward_funcs == functions
    return said, float(engine.train_batch(data()))
