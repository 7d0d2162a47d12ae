"""Bytes that live after the forward of blocks, by phases and whole; run on pooled ranks."""

from __future__ import annotations

import math

import deepspeed_moe_runs
import torch
import torch.distributed as dist
from deepspeed.moe.sharded_moe import MOELayer
from made_bytes import LEAVES, Made
from torch import nn
from torch.utils._pytree import tree_leaves

from dualpipe_engine.models.attention import Attention
from dualpipe_engine.models.block import DenseBlock, MoEBlock
from dualpipe_engine.models.config import MoEConfig
from dualpipe_engine.runtime.chunk import StageChunk
from dualpipe_engine.runtime.overlap import PhasedChunk, phases_of

TOKENS = (4, 32)


def stages():
    """name -> (layers, a micro-batch)"""
    sizes = {"hidden": 16, "heads": 2, "head": 8, "rotary": 4, "kv_rank": 8, "experts": 4, "expert_inner": 8}
    shared = MoEConfig(**sizes, expert_parallel=2)
    x = torch.randn(*TOKENS, 16)
    loss = torch.zeros(1, requires_grad=True)
    found = {
        "dense": ([DenseBlock(shared), DenseBlock(shared)], x),
        "experts": ([DenseBlock(shared), MoEBlock(shared, dist.get_rank()), MoEBlock(shared, dist.get_rank())], x),
        "no shared experts": ([MoEBlock(MoEConfig(**sizes, expert_parallel=2, shared_experts=0), dist.get_rank())], x),
        "auxiliary loss": (
            [MoEBlock(MoEConfig(**sizes, expert_parallel=2, balancing="loss"), dist.get_rank())],
            (x, loss),
        ),
        "shared sequences": ([DenseBlock(shared), MoEBlock(shared, dist.get_rank()), DenseBlock(shared)], x),
        "all experts": ([MoEBlock(MoEConfig(**sizes))], x),
        "DeepSpeed's": ([deepspeed_moe_runs.PhasedBlock(), deepspeed_moe_runs.PhasedBlock(True)], (x[..., :8], loss)),
    }
    for layers, _ in found.values():
        for layer in layers:
            if isinstance(layer, MoEBlock) and layer.ep_size > 1:
                layer.connect(dist.group.WORLD)
            elif isinstance(layer, deepspeed_moe_runs.Block):
                layer.moe.set_deepspeed_parallelism()
    for layer in found["shared sequences"][0]:
        for part in (layer, layer.attention):
            if isinstance(part, (DenseBlock, Attention)):
                part.share_sequences(dist.group.WORLD)
    return found


def alive_after_forward():
    """name -> bytes of the whole block and by phases."""
    found = {}
    for name, (layers, inputs) in stages().items():
        whole = nn.Sequential(*layers)
        by_phases = PhasedChunk(whole, 0, phases_of(layers), 60.0, is_last=False)
        assert any(phase.kind == "comm" for phase in by_phases._phases) == (name != "dense")
        for chunk in (StageChunk(whole, 0, is_last=False), by_phases):
            leaves = torch.utils._pytree.tree_map(lambda value: value.detach().clone().requires_grad_(), inputs)
            with Made(whole) as made:
                chunk.forward(0, leaves)
                chunk.release_outputs(0)
            held = found.setdefault(name, [])
            held.append(made.alive(held[0] + LEAVES if held else math.inf))
            grads = [torch.ones_like(leaf) for leaf in tree_leaves(leaves)]
            chunk.backward(0, grads)
            assert all(leaf.grad is not None for leaf in tree_leaves(leaves))
            del leaves, grads
            if chunk is by_phases:
                for part in whole.modules():
                    if isinstance(part, MOELayer):
                        part.l_aux = part.exp_counts = None  # for who reads them after a step
                assert made.alive(0) == 0, f"{name}: something outlives the backward"
    return found
