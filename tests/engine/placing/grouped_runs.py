"""Lists, groups and optimizers that users make over a built PipelineModule, on pooled ranks and in one process."""

from __future__ import annotations

import torch
from changed_runs import (
    BLOCKS,
    STEPS,
    WIDTH,
    Block,
    Numbered,
    blocks,
    built,
    by_itself,
    by_layer,
    data,
    fill,
    settings,
    weights,
)
from deepspeed.pipe import LayerSpec
from torch import nn


class Scale(nn.Module):
    """Vectors only."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        return self.norm(x)


class Matrix(nn.Linear):
    """A matrix only."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH, bias=False)


KINDS = [Scale, Scale, Matrix, Block]


def by_decay(named, dropped=False):
    named = list(named)
    groups = [
        {"params": [param for _, param in named if param.dim() > 1], "weight_decay": 0.5, "lr": 0.05},
        {"params": [param for _, param in named if param.dim() <= 1], "weight_decay": 0.0, "lr": 0.01},
    ]
    return [group for group in groups if group["params"] or not dropped]


def grouped(schedule):
    """What the user says of parameters, in every way; name -> (losses, weights)."""
    import dualpipe_engine

    found = {}

    def train(name, kinds=None, how=by_layer, config=None, optimizer=None, later=None):
        net = built([LayerSpec(kind) for kind in kinds or [Block] * BLOCKS])
        fill(net)
        groups = how(net.named_parameters())
        given = {"model_parameters": groups} if optimizer is None else {"optimizer": optimizer(groups)}
        config = settings(schedule, **(config or {}))
        if optimizer or later:
            del config["optimizer"]
        engine, *_ = dualpipe_engine.initialize(model=net, config=config, **({} if later else given))
        if later:
            engine._configure_optimizer(later, groups)
        stream = data()
        losses = [float(engine.train_batch(stream)) for _ in range(STEPS)]
        held = {key: value for key, value in weights(engine).items() if "nothing" not in key}
        norm = engine.get_global_grad_norm()
        found[name] = losses, held, None if norm is None else float(norm)

    zero = {"zero_optimization": {"stage": 1}}
    decay = zero | {
        "gradient_clipping": 1e9,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.05, "torch_adam": True}},
    }
    train("layers")
    train("layers, ZeRO-1", config=zero)
    train("layers, own optimizer", optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0))
    train("layers, configured later", later=lambda groups: torch.optim.SGD(groups, lr=1.0))
    train("list", how=lambda named: [param for name, param in named if name[0] in "03"])
    train(
        "list, configured later", how=lambda named: [p for _, p in named], later=lambda ps: torch.optim.SGD(ps, lr=0.1)
    )
    train("decay", KINDS, by_decay, decay)
    train("decay, dropped", KINDS, lambda named: by_decay(named, dropped=True), decay)
    return found


def expected_of_groups(name):
    net = Numbered([kind() for kind in (KINDS if "decay" in name else [Block] * BLOCKS)])
    fill(net)
    named = list(net.named_parameters())
    if "decay" in name:
        optimizer = torch.optim.AdamW(by_decay(named), lr=0.05)
    elif "layers" in name:
        optimizer = torch.optim.SGD(by_layer(named), lr=1.0)
    else:
        listed = [param for each, param in named if name != "list" or each[0] in "03"]
        optimizer = torch.optim.SGD(listed, lr=0.1)
    return by_itself(net, optimizer), {name: param.detach() for name, param in net.named_parameters()}, norm_of(net)


def norm_of(net):
    return float(torch.stack([param.grad.norm() for param in net.parameters()]).norm())


def foreign_parameter():
    import dualpipe_engine

    net = built()
    params = [*net.parameters(), nn.Parameter(torch.ones(3))] if torch.distributed.get_rank() else net.parameters()
    dualpipe_engine.initialize(model=net, config=settings("dualpipe"), model_parameters=params)


def dtypes_in_a_group():
    import dualpipe_engine

    net = built()
    for block in blocks(net):
        block.a.weight.data = block.a.weight.data.double()
    dualpipe_engine.initialize(model=net, config=settings("zb1p", zero_optimization={"stage": 1}))
