"""A job in the shape of GPT-NeoX and Megatron-DeepSpeed: model class, scheduler, batches, masks and client state."""

from __future__ import annotations

import argparse
import json
import math
import random
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn

VOCABULARY, WIDTH, LENGTH, BLOCKS, MICROS = 17, 8, 6, 4, 4


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)

    @property
    def word_weight(self):
        return self.words.weight

    def forward(self, inputs):
        tokens, positions, mask = inputs
        return self.words(tokens) + self.positions(positions), mask


class SoftPrompt(nn.Module):
    def __init__(self):
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1)))

    def forward(self, inputs):
        hidden, mask = inputs
        return torch.cat([hidden[:, :2] + self.prompt, hidden[:, 2:]], 1), mask


class ParallelBlock(nn.Module):
    """Attention under a mask that travels with the hidden states, [sequence, batch, width]."""

    def __init__(self, number, use_cache=False):
        super().__init__()
        self.number, self.use_cache = number, use_cache
        self.norm = nn.LayerNorm(WIDTH)
        self.mixed = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs):
        hidden, mask = inputs
        query, key, value = self.mixed(self.norm(hidden)).transpose(0, 1).chunk(3, -1)
        scores = query @ key.transpose(-1, -2) / math.sqrt(WIDTH)
        scores.masked_fill_(mask[:, 0], torch.finfo(scores.dtype).min)
        return hidden + self.down((scores.softmax(-1) @ value).transpose(0, 1)), mask


def before_blocks(inputs):
    return inputs[0].transpose(0, 1).contiguous(), *inputs[1:]


def after_blocks(inputs):
    return inputs[0].transpose(0, 1).contiguous()


def masked_mean(logits, labels, half=False):
    labels, mask = labels
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * mask.flatten()).sum() / mask.sum()


class ModelPipe(PipelineModule, nn.Module):
    """Attributes come before the constructor, whose arguments `insert_layers` gives to it once more."""

    def __init__(self, args, topology):
        self.args, self.parallel_output, self.specs = args, True, []
        embed = partial(TiedLayerSpec, "embed", Embedding, tied_weight_attr="word_weight")
        blocks = [LayerSpec(ParallelBlock, number, use_cache=False) for number in range(BLOCKS)]
        self.specs += [embed(), before_blocks, *blocks, after_blocks, LayerSpec(nn.LayerNorm, WIDTH)]
        self.specs.append(embed(forward_fn=self._logits))
        self._construct(topology)

    def _construct(self, topology):
        super().__init__(
            layers=self.specs,
            loss_fn=partial(masked_mean, half=False),
            topology=topology,
            activation_checkpoint_interval=self.args.interval,
            partition_method="type:ParallelBlock",
            checkpointable_layers=["ParallelBlock"],
        )

    def _logits(self, embedding, hidden):
        assert self.parallel_output
        return nn.functional.linear(hidden, embedding.word_weight)

    def insert_layers(self, layer, index):
        self.specs.insert(index, layer)
        self._construct(self._topo)


class Annealing:
    """A scheduler that is none of torch's: it writes learning rates into the groups of whatever optimizer it has."""

    def __init__(self, optimizer):
        self.optimizer, self.steps = optimizer, 0
        self.step(0)

    def step(self, steps=None):
        self.steps = self.steps + 1 if steps is None else steps
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01 * min(1.0, (self.steps + 1) / 4)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.step(state["steps"])


def groups_of(module):
    """Norms and biases do not decay; layers that are tied occur once."""
    decayed, plain = {"params": []}, {"params": [], "weight_decay": 0.0}
    for part in module.modules():
        for name, param in part.named_parameters(recurse=False):
            if param.requires_grad:
                (plain if isinstance(part, nn.LayerNorm) or name == "bias" else decayed)["params"].append(param)
    return [decayed, plain]


def batch_of(data, args, lengths):
    """Inputs and labels from a row of text, cut to the length of the step: a curriculum."""
    args.length = lengths[min(args.step, len(lengths) - 1)]
    tokens, labels = data["text"][:, : args.length], data["text"][:, 1 : args.length + 1]
    positions = torch.arange(args.length).expand_as(tokens)
    mask = torch.ones(1, 1, args.length, args.length).tril() < 0.5
    return (tokens.contiguous(), positions, mask), (labels.contiguous(), (tokens != 3).float())


def rows(seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield {"text": torch.randint(0, VOCABULARY, (2, LENGTH + 1), generator=generator)}


def train(folder, schedule, steps, interval=0, lengths=(LENGTH,), prompt=False, load=False, save_at=None):
    """Losses, learning rates and norms of a job; data for the first and the last pipeline rank alone."""
    import dualpipe_engine

    rank, world = dist.get_rank(), dist.get_world_size()
    args = argparse.Namespace(interval=interval, step=0, local_rank=rank)
    args.deepspeed_config = f"{folder}/{schedule}-{rank}.json"
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": MICROS, "gradient_clipping": 1.0}
    config |= {"pipeline": {"schedule": schedule}} if schedule else {}
    config |= {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True, "steps_per_print": None}
    Path(args.deepspeed_config).write_text(json.dumps(config))
    random.seed(7)
    torch.manual_seed(7)
    module = ModelPipe(args, PipeModelDataParallelTopology(num_pp=world, num_mp=1, num_dp=1))
    if prompt:
        module.insert_layers(SoftPrompt(), 1)
    optimizer = torch.optim.AdamW(groups_of(module), lr=0.01, weight_decay=0.1)
    engine, optimizer, _, scheduler = dualpipe_engine.initialize(
        args, module, optimizer, lr_scheduler=Annealing(optimizer), dist_init_required=False, mpu=None
    )
    engine.set_has_attention_mask(True)
    engine.set_batch_fn(partial(batch_of, args=args, lengths=lengths))
    assert engine.grid.get_pipe_parallel_rank() == rank and engine.grid.get_slice_parallel_rank() == 0
    data = rows(1)
    if load:
        _, state = engine.load_checkpoint(folder)
        args.step = state["step"]
        assert state["args"].interval == interval
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        for _ in range(args.step * MICROS):
            next(data)
    scheduler.optimizer = engine.optimizer
    found = {"losses": [], "rates": [], "norms": []}
    while args.step < steps:
        if len(lengths) > 1:
            engine.reset_activation_shape()
        found["losses"].append(float(engine.train_batch(data if rank in (0, world - 1) else None)))
        found["rates"].append(optimizer.param_groups[0]["lr"])
        found["norms"].append(float(engine.get_global_grad_norm()))
        args.step += 1
        if args.step == save_at:
            state = {"step": args.step, "args": args, "python": random.getstate()}
            state |= {"numpy": np.random.get_state(), "torch": torch.get_rng_state()}
            engine.save_checkpoint(folder, tag=f"global_step{args.step}", client_state=state)
    engine.eval()
    loss, logits = engine.eval_batch(rows(2), return_logits=True)
    found["evaluated"] = float(loss), None if logits is None else float(logits.abs().sum())
    engine.destroy()
    return found
