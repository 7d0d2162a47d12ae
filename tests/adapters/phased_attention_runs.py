"""Pieces of models of transformers whose ranks share sequences, by phases and whole; run on pooled ranks."""

from __future__ import annotations

import gc
import math
from typing import NamedTuple

import autoep_runs
import kinds
import models
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from made_bytes import LEAVES, Made
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from dualpipe_engine.models.autoep.decoder import offer_phases
from dualpipe_engine.models.autoep.find import find_blocks
from dualpipe_engine.models.autoep.layer import SharedMoE
from dualpipe_engine.runtime.chunk import StageChunk
from dualpipe_engine.runtime.overlap import PhasedChunk, phases_of
from dualpipe_engine.runtime.phases import Phased

TOKENS = (4, 16)  #: of a rank's part
RANKS = 2


def gated(attention):
    """A forward of an attention that weighs its results by what projects the queries."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def forward(hidden_states, attention_mask=None, **_):
        queries = attention.q_proj(hidden_states)
        shape = (*queries.shape[:-1], -1, attention.head_dim)
        parts = (queries, attention.k_proj(hidden_states), attention.v_proj(hidden_states))
        parts = [part.view(shape).transpose(1, 2) for part in parts]
        mixed, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](attention, *parts, attention_mask)
        return attention.o_proj(mixed.flatten(2) * queries.sigmoid()), None

    return forward


def layers_of(name, experts=False, changes=None, gate=False):
    """The blocks of a model as layers whose ranks share sequences, and with `experts` these too."""
    from dualpipe_engine.adapters import get_model_adapter

    config = kinds.config_of(name) if name in kinds.MORE else autoep_runs.config_of(name, **(changes or {}))
    config.num_hidden_layers = 2
    adapter = get_model_adapter(autoep_runs.skewed(models.model_of(config), name))
    layers = [spec.build() for spec in adapter.to_layer_specs()[1:-1]]
    for number, layer in enumerate(layers if experts else (), 1):
        section = parse_autoep_config({"enabled": True, "autoep_size": RANKS})
        for path, spec, completed in find_blocks(layer, number, section):
            moe = SharedMoE(spec, layer.get_submodule(path), RANKS, dist.get_rank(), completed)
            moe.ep_group = dist.group.WORLD
            above, _, last = path.rpartition(".")
            setattr(layer.get_submodule(above), last, moe)
            assert offer_phases(layer) is None
    for layer in layers:
        layer.share_sequences(dist.group.WORLD)
        for part in layer.modules() if gate else ():
            if hasattr(part, "q_proj"):
                part.forward = gated(part)
    return layers


class Side(NamedTuple):
    """Of a stage, run in one way: what it returns, gradients, and bytes alive behind its forward and its backward,
    without a collection of garbage."""

    output: torch.Tensor
    grads: dict[str, torch.Tensor]
    behind_forward: int
    behind_backward: int


def sides(name, **kwargs):
    """The stage whole, and by phases."""
    layers = layers_of(name, **kwargs)
    for layer in layers:
        assert (why := layer.offer_exchanges(dist.group.WORLD)) is None, f"{name}: {why}"
    whole = nn.Sequential(*layers)
    by_phases = PhasedChunk(whole, 0, phases_of(layers), 60.0, is_last=False)
    assert [phase.name for phase in by_phases._phases if phase.kind == "comm"].count("heads") == len(layers)
    torch.manual_seed(3 + dist.get_rank())
    message = message_of(layers[0], torch.randn(*TOKENS, 32))
    found = []
    for chunk in (StageChunk(whole, 0, is_last=False), by_phases):
        torch.manual_seed(5)
        whole.zero_grad()
        given = tree_map(lambda x: x.clone().requires_grad_() if x.is_floating_point() else x, message)
        gc.collect()
        gc.disable()
        with Made(whole, collects=False) as made:
            out = tree_leaves(chunk.forward(0, given))[0].clone()
        alive = made.alive(found[0].behind_forward + LEAVES if found else math.inf)
        leaf = tree_leaves(given)[0]
        chunk.backward(0, [out.sin()])
        grads = {key: param.grad.clone() for key, param in whole.named_parameters() if param.grad is not None}
        grads[""] = leaf.grad.clone()
        del given, leaf
        left = made.alive(found[0].behind_backward if found else math.inf)
        gc.enable()
        found.append(Side(out, grads, alive, left))
    return found


def message_of(layer, hidden):
    """What a layer is given, with ids of whole sequences where its model asks for them."""
    ids = torch.ones(len(hidden), RANKS * hidden.shape[1], dtype=torch.long)
    return hidden if layer._runners[0]._inputs.embeds else (hidden, {"input_ids": ids})


def each(cases):
    return [sides(**case) for case in cases]


def refused(names):
    """name -> why the layer offers no phases, and whether it still does what it did."""
    found = []
    for name in names:
        layer = layers_of("llama")[0]
        block = layer.model.layers.get_submodule("0")
        hook = None
        if name == "counts":
            block.forward = counting(block.forward, math.inf)
        elif name == "fails":
            block.forward = counting(block.forward, 3)
        elif name == "checkpoints":
            block.gradient_checkpointing = True
        elif name == "hooked" or dist.get_rank() == 0:
            hook = block.self_attn.register_forward_hook(lambda *_: None)
        why = layer.offer_exchanges(dist.group.WORLD)
        assert not isinstance(layer, Phased) and layer.exchanges() == []
        if hook is not None:
            hook.remove()
        block.__dict__.pop("forward", None)
        torch.manual_seed(1)
        message = message_of(layer, torch.randn(*TOKENS, 32))
        block.gradient_checkpointing = False
        fresh = layers_of("llama")[0]
        found.append((why, torch.equal(layer(message), fresh(message))))
    return found


def counting(forward, most):
    """A forward that adds the number of its calls, and fails after so many of them."""
    calls = 0

    def run(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > most:
            raise ValueError("run again")
        return forward(*args, **kwargs) + calls

    return run
