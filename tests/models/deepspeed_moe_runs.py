"""A PipelineModule with DeepSpeed's own MoE layers, as its users write it; trained on pooled ranks."""

from __future__ import annotations

import copy

import torch
from deepspeed.moe.layer import MoE
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import nn

from dualpipe_engine.models.deepspeed_moe import moe_phases

VOCABULARY, WIDTH = 17, 8


class Embed(nn.Embedding):
    def forward(self, tokens):
        x = super().forward(tokens)
        return x, x.new_zeros(1).requires_grad_()


class Block(nn.Module):
    def __init__(self, residual=False, k=1):
        super().__init__()
        self.mixer = nn.Linear(WIDTH, WIDTH)
        expert = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))
        gate = {"k": k, "use_rts": False, "top2_2nd_expert_sampling": False}  # nothing random
        self.moe = MoE(WIDTH, expert, num_experts=4, ep_size=2, use_residual=residual, **gate)

    def before(self, state):
        x, loss = state
        x = x + torch.tanh(self.mixer(x))
        return (x, loss), x

    def after(self, carried, out, auxiliary, counts):
        x, loss = carried
        return x + out, loss + 0.1 * auxiliary

    def forward(self, state):
        carried, hidden = self.before(state)
        return self.after(carried, *self.moe(hidden))


class PhasedBlock(Block):
    def phases(self):
        return moe_phases(self.moe, self.before, self.after)


class Head(nn.Linear):
    def forward(self, state):
        return super().forward(state[0]), state[1]


def loss(output, labels):
    return nn.functional.cross_entropy(output[0].flatten(0, 1), labels.flatten()) + output[1].sum()


def train(settings, phased, ranks=2, replicas=2, steps=3):
    import training

    import dualpipe_engine

    torch.manual_seed(3)
    block = PhasedBlock if phased else Block
    blocks = [LayerSpec(block, False), LayerSpec(block, True), LayerSpec(block, False, 2), LayerSpec(block, False)]
    module = PipelineModule(
        layers=[LayerSpec(Embed, VOCABULARY, WIDTH), *blocks, LayerSpec(Head, WIDTH, VOCABULARY)],
        topology=PipeDataParallelTopology(ranks, replicas),
        loss_fn=loss,
    )
    replica = module._grid.data_parallel_id
    engine, *_ = dualpipe_engine.initialize(model=module, config=copy.deepcopy(settings))
    data = training.stream(replica)
    losses = [float(engine.train_batch(data)) for _ in range(steps)]
    transfers = {transfer.name for transfer in getattr(engine, "_transfers", ())}
    found = {"losses": losses, "replica": replica, "weights": training.weights(engine), "transfers": transfers}
    engine.destroy()
    return found
