"""Random changes of the blocks of a PipelineModule, drawn from a seed that all ranks and the oracle know."""

from __future__ import annotations

import random
from typing import NamedTuple

import changed_runs as runs
import torch
from changed_runs import MICROS, Block, Numbered, built, by_itself, by_layer, data, fill, settings, weights
from deepspeed.pipe import LayerSpec
from torch import nn

BLOCKS = 8
ADAM = {"lr": 0.1, "weight_decay": 0.1, "eps": 1e-3}
SCHEDULES = ("dualpipe", "dualpipev", "zb1p", "zbv", "1f1b")


def pre_hook_with_keywords(block):
    block.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] * 0.5,), kwargs), with_kwargs=True)


def backward_hook(block):
    block.a.register_full_backward_hook(lambda module, into, out: tuple(g if g is None else g * 0.5 for g in into))


def buffer(block):
    block.register_buffer("shift", torch.full((runs.WIDTH,), 0.25), persistent=False)
    block.register_forward_hook(lambda module, inputs, output: output + module.shift)


def orthogonal(block):
    nn.utils.parametrizations.orthogonal(block.a, orthogonal_map="cayley", use_trivialization=False)


def without_bias(block):
    block.a.bias = None


def _count(module, inputs, output):
    module.seen = module.seen + inputs[0].detach().float().abs().mean()


def written_buffer(block):
    block.register_buffer("seen", torch.zeros(()))
    block.register_forward_hook(_count)


STRUCTURE = (*runs.STRUCTURE, orthogonal, without_bias)
OTHERS = (*runs.OTHERS, pre_hook_with_keywords, backward_hook, buffer)
CHANGES = {change.__name__: change for change in (*STRUCTURE, *OTHERS, written_buffer)}
GROUPS = ("all", "trained", "by layer", "decay")


class Case(NamedTuple):
    """What a seed stands for.

    Args:
        schedule: of the pipeline.
        zero: ZeRO stage.
        adam: AdamW in place of SGD.
        groups: how parameters are given, see `groups_of`.
        changes: block -> names of its changes.
        flip: blocks whose weights are frozen after the first step and trained again after the second.
        refused: what the error says; None: it has to train.
    """

    schedule: str
    zero: int
    adam: bool
    groups: str
    changes: dict[int, list[str]]
    flip: tuple[int, ...]
    refused: str | None

    @property
    def kinds(self):
        return {name for names in self.changes.values() for name in names}


def draw(seed):
    chance = random.Random(seed)
    schedule, zero = SCHEDULES[seed % len(SCHEDULES)], chance.randint(0, 1)
    adam, groups = chance.random() < 0.5, chance.choice(GROUPS)
    changes = {}
    for number in range(BLOCKS):
        if chance.random() < 0.7:
            chosen = chance.sample(STRUCTURE, chance.randint(0, 1)) + chance.sample(OTHERS, chance.randint(0, 3))
            if zero and groups != "by layer" and runs.double in chosen:
                chosen.remove(runs.double)  # ZeRO takes one dtype a group
            changes[number] = [change.__name__ for change in chosen]
    flip = tuple(number for number in range(BLOCKS) if chance.random() < 0.2) if chance.random() < 0.4 else ()
    if written := chance.random() < 0.15:
        changes.setdefault(chance.randrange(BLOCKS), []).append("written_buffer")
    refused = None
    if written and schedule == "dualpipe":
        refused = "forwards write the buffer"
    elif flip and zero and adam:
        refused = "has changed, but"
    return Case(schedule, zero, adam, groups, changes, flip, refused)


def change(net, case):
    for name, part in list(net.named_modules()):
        if isinstance(part, Block) and name.isdigit():
            for kind in case.changes.get(int(name), ()):
                CHANGES[kind](part)
    fill(net)


def groups_of(net, case):
    named = list(net.named_parameters())
    if case.groups == "all":
        return [param for _, param in named]
    if case.groups == "trained":
        return [param for _, param in named if param.requires_grad]
    if case.groups == "by layer":
        return by_layer(named)
    matrices = [param for _, param in named if param.dim() > 1]
    vectors = [param for _, param in named if param.dim() <= 1]
    found = [{"params": matrices, "lr": 0.05}, {"params": vectors, "lr": 0.1}]
    return [group for group in found if group["params"]]


def flip(net, case, on, trained):
    for name, param in net.named_parameters():
        if name.split(".")[0] in map(str, case.flip) and name in trained:
            param.requires_grad_(on)


def expected(case):
    net = Numbered([Block() for _ in range(BLOCKS)])
    change(net, case)
    trained = {name for name, param in net.named_parameters() if param.requires_grad}
    groups, stream, losses = groups_of(net, case), data(), []
    optimizer = torch.optim.AdamW(groups, **ADAM) if case.adam else torch.optim.SGD(groups, lr=0.1)
    for on in (True, False, True):
        flip(net, case, on, trained)
        losses += by_itself(net, optimizer, 1, stream)
    return losses, {name: param.detach() for name, param in net.named_parameters()}


def train(case):
    import dualpipe_engine

    net = built([LayerSpec(Block) for _ in range(BLOCKS)])
    change(net, case)
    kind = {"type": "SGD", "params": {"lr": 0.1}}
    if case.adam:
        kind = {"type": "AdamW", "params": {**ADAM, "torch_adam": True}}
    config = settings(case.schedule, optimizer=kind, zero_optimization={"stage": case.zero})
    engine, *_ = dualpipe_engine.initialize(model=net, config=config, model_parameters=groups_of(net, case))
    assert engine.micro_batches == MICROS
    trained = {name for name, param in engine.module.named_parameters() if param.requires_grad}
    stream, losses = data(), []
    for on in (True, False, True):
        flip(engine.module, case, on, trained)
        losses.append(float(engine.train_batch(stream)))
    return losses, {name: value for name, value in weights(engine).items() if "nothing" not in name}


def changed(seeds):
    """seed -> what `train` has found, or the error; nothing is run after an error that has ended the job."""
    from dualpipe_engine.errors import DualPipeError

    found = {}
    for seed in seeds:
        try:
            found[seed] = train(draw(seed))
        except DualPipeError as error:
            found[seed] = str(error)
            if not error.everywhere:
                break
    return found
