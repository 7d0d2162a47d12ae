"""A PipelineModule with DeepSpeed's own MoE layers, as its users write it; trained on pooled ranks."""

from __future__ import annotations

import copy

import pytest
import torch
from deepspeed.moe.layer import MoE
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, PipeModelDataParallelTopology
from torch import nn

from dualpipe_engine.errors import CheckpointError, ConfigError
from dualpipe_engine.models.deepspeed_moe import moe_phases

VOCABULARY, WIDTH = 17, 8


class Embed(nn.Embedding):
    def forward(self, tokens):
        x = super().forward(tokens)
        return x, x.new_zeros(1).requires_grad_()


class Block(nn.Module):
    def __init__(self, residual=False, k=1, ep_size=2):
        super().__init__()
        self.mixer = nn.Linear(WIDTH, WIDTH)
        expert = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))
        gate = {"k": k, "use_rts": False, "top2_2nd_expert_sampling": False}  # nothing random
        self.moe = MoE(WIDTH, expert, num_experts=4, ep_size=ep_size, use_residual=residual, **gate)

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


def count(counted, *_):
    counted.calls = getattr(counted, "calls", 0) + 1


def hooked(settings, ranks=2, replicas=2):
    """How often hooks on DeepSpeed's layer ran in a batch, and the names of transfers; then a hook that comes late."""
    import training

    import dualpipe_engine

    blocks = [LayerSpec(PhasedBlock) for _ in range(2)]
    module = PipelineModule(
        layers=[LayerSpec(Embed, VOCABULARY, WIDTH), *blocks, LayerSpec(Head, WIDTH, VOCABULARY)],
        topology=PipeDataParallelTopology(ranks, replicas),
        loss_fn=loss,
        partition_method="uniform",
    )
    first = (
        next((part for part in module.modules() if isinstance(part, PhasedBlock)), None) if module.stage_id else None
    )
    if first is not None:
        first.moe.register_forward_hook(count)
    data = training.stream(module._grid.data_parallel_id)
    engine, *_ = dualpipe_engine.initialize(model=module, config=copy.deepcopy(settings))
    engine.train_batch(data)
    calls = [getattr(part, "calls", 0) for part in engine.module.modules() if isinstance(part, MoE)]
    found = {"calls": calls, "unphased": dict(engine.module.dualpipe_unphased)}
    engine.module.register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match="runs by phases, which pass by the hooks"):
        engine.train_batch(data)
    engine.destroy()
    return found


def resumed(settings, folder, ranks=2, replicas=2):
    """Losses after a checkpoint, in the run that goes on and in one that has loaded it; and the weights of single
    experts as they were saved, and in an engine whose ranks share no experts."""
    import training

    import dualpipe_engine

    def start(schedule, ep_size=2):
        blocks = [LayerSpec(PhasedBlock, True, 1, ep_size), LayerSpec(PhasedBlock, False, 2, ep_size)]
        module = PipelineModule(
            layers=[LayerSpec(Embed, VOCABULARY, WIDTH), *blocks, LayerSpec(Head, WIDTH, VOCABULARY)],
            topology=PipeDataParallelTopology(ranks, replicas),
            loss_fn=loss,
        )
        replica = module._grid.data_parallel_id
        for number, param in enumerate(module.parameters()):
            torch.manual_seed(100 * replica + number)  # no expert is like another
            if not getattr(param, "allreduce", True):
                nn.init.normal_(param)
        config = copy.deepcopy(settings)
        config["pipeline"]["schedule"] = schedule
        engine, *_ = dualpipe_engine.initialize(model=module, config=config)
        return engine, training.stream(replica)

    engine, data = start("dualpipe")
    engine.train_batch(data)
    for part in engine.module.modules():
        if isinstance(part, MoE):  # as DeepSpeed's own forward leaves it
            assert part.deepspeed_moe.l_aux > 0 and part.deepspeed_moe.exp_counts.sum() > 0
    engine.save_checkpoint(folder)
    saved = numbered(engine.module)
    losses = [float(engine.train_batch(data)) for _ in range(2)]
    engine.destroy()
    again, data = start("dualpipe")
    again.load_checkpoint(folder)
    for _ in range(settings["gradient_accumulation_steps"]):
        next(data)
    loaded = [float(again.train_batch(data)) for _ in range(2)]
    again.destroy()
    other, _ = start("zbv")
    with pytest.raises(CheckpointError, match="load the weights alone: the optimizer state of experts of deepspeed"):
        other.load_checkpoint(folder)
    other.destroy()
    other, _ = start("1f1b", ep_size=1)
    other.load_checkpoint(folder, load_optimizer_states=False, load_lr_scheduler_states=False)
    found = {"losses": losses, "loaded": loaded, "saved": saved, "moved": numbered(other.module)}
    other.destroy()
    return found


def numbered(module):
    """Name of each parameter, with the number of an expert among all -> a copy."""
    found = {}
    for path, part in module.named_modules():
        if not isinstance(part, MoE):
            continue
        first = torch.distributed.get_rank(part.deepspeed_moe.ep_group) * part.num_local_experts
        for number, expert in enumerate(part.deepspeed_moe.experts.deepspeed_experts):
            found |= {
                f"{path}.{first + number}.{name}": param.detach().clone() for name, param in expert.named_parameters()
            }
    return found


def sliced(settings):
    """A start with tensor parallelism, which each rank must refuse."""
    import dualpipe_engine

    module = PipelineModule(
        layers=[LayerSpec(Embed, VOCABULARY, WIDTH), LayerSpec(Block), LayerSpec(Head, WIDTH, VOCABULARY)],
        topology=PipeModelDataParallelTopology(2, 2, 1),
        loss_fn=loss,
    )
    with pytest.raises(ConfigError, match=r"deepspeed\.moe\.layer\.MoE and tensor parallelism do not go together"):
        dualpipe_engine.initialize(model=module, config=copy.deepcopy(settings))


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
