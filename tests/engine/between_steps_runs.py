"""What changes while a model trains: what is trained, buffers, parameters of the loss."""

from __future__ import annotations

import torch
from changed_runs import BLOCKS, STEPS, WIDTH, Block, Numbered, built, by_itself, data, fill, mse, settings, weights
from deepspeed.pipe import LayerSpec
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
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


def frozen_with(**config):
    """Plain SGD does not move what has no gradient, whatever the optimizer keeps its copies in: freeze, then back."""
    import dualpipe_engine

    net = built()
    fill(net)
    more = settings("dualpipe", **config)
    engine, *_ = dualpipe_engine.initialize(model=net, config=more, model_parameters=net.parameters())
    stream = data(dtype=torch.bfloat16 if "bf16" in config else torch.float32)
    losses = []
    for on in (True, False, True):
        flip(engine.module, on)
        losses.append(float(engine.train_batch(stream)))
    return losses, {n: value.float() for n, value in weights(engine).items()}


def expected_of_frozen():
    net = Numbered([Block() for _ in range(BLOCKS)])
    fill(net)
    optimizer, stream, losses = optimizer_of("sgd", net.parameters()), data(), []
    for on in (True, False, True):
        flip(net, on)
        losses += by_itself(net, optimizer, 1, stream)
    return losses, {name: param.detach() for name, param in net.named_parameters()}


def refused_flip(start, on_ranks, **config):
    """The error of a flip after the first step, on the ranks `on_ranks`."""
    import dualpipe_engine

    net = built()
    if not start:
        flip(net, False)
    engine, *_ = dualpipe_engine.initialize(
        model=net, config=settings("dualpipe", **config), model_parameters=net.parameters()
    )
    stream = data()
    engine.train_batch(stream)
    if engine.global_rank in on_ranks:
        flip(engine.module, not start)
    engine.train_batch(stream)


class Moving(Block):
    """Writes a buffer in its forward: what it has seen, how often it ran, or a table that depends on neither."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x):
        self.seen = torch.ones(WIDTH) if self.kind == "table" else self.seen + self.step(x)
        return super().forward(x) * (0.5 if self.kind == "seen" else 1.0)

    def step(self, x):
        return 1.0 if self.kind == "counter" else x.detach().sum(0)


class Normed(Block):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return super().forward(self.bn(x))


def with_buffers(schedule, kinds, **pipeline):
    import dualpipe_engine

    losses = None
    for kind in kinds:
        spec = LayerSpec(Normed) if kind == "bn" else LayerSpec(Moving, kind)
        net = built([spec, *[LayerSpec(Block) for _ in range(3)]])
        fill(net)
        config = settings(schedule)
        config["pipeline"] |= pipeline
        engine, *_ = dualpipe_engine.initialize(model=net, config=config, model_parameters=net.parameters())
        stream = data()
        losses = [float(engine.train_batch(stream)) for _ in range(STEPS)]
    return losses, {name: buffer.clone() for name, buffer in engine.module.named_buffers()}


class Weighted(nn.Module):
    """A loss with a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5))
        self.offset = nn.Parameter(torch.tensor(0.5))  # without dimensions

    def forward(self, output, labels):
        return mse(output * self.scale + self.offset, labels)


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
    fill(nn.ModuleDict({"loss_fn": loss_fn}))
    losses = by_itself(net, torch.optim.SGD(both.parameters(), lr=0.1), loss_fn=loss_fn)
    return losses, dict(net.named_parameters()) | {f"loss_fn.{n}": p for n, p in loss_fn.named_parameters()}


def clip(net, how):
    """Change some of the weights, as a callback may."""
    with torch.no_grad():
        for name, param in net.named_parameters():
            if name.endswith("a.weight") and how == "master":
                safe_set_full_fp32_param(param, safe_get_full_fp32_param(param).clamp(-0.2, 0.1))
            elif name.endswith("a.weight"):
                (param if how == "in place" else param.data).clamp_(-0.2, 0.1)


def clipped(ways, folder):
    """Losses of three steps, with weights that are changed behind each; the last one goes on from a checkpoint."""
    import dualpipe_engine

    found = {}
    for number, (how, config) in enumerate(ways):
        steps, stream = [], data(dtype=torch.float16 if "fp16" in config else torch.float32)
        if "bf16" in config:
            stream = data(dtype=torch.bfloat16)
        for saved in (False, True):
            net = built()
            fill(net)
            engine, *_ = dualpipe_engine.initialize(model=net, config=settings("dualpipe", **config))
            if saved:
                engine.load_checkpoint(f"{folder}/{number}")
            for _ in range(1 if saved else 2):
                steps.append(float(engine.train_batch(stream)))
                clip(engine.module, how)
            if not saved:
                engine.save_checkpoint(f"{folder}/{number}")
            found[number] = steps, {n: value.float() for n, value in weights(engine).items()}
            engine.destroy()
    return found


def expected_of_clipped():
    net = Numbered([Block() for _ in range(BLOCKS)])
    fill(net)
    optimizer, stream, losses = optimizer_of("sgd", net.parameters()), data(), []
    for _ in range(3):
        losses += by_itself(net, optimizer, 1, stream)
        clip(net, "in place")
    return losses, {name: param.detach() for name, param in net.named_parameters()}
