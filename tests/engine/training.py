"""Small models and training runs that the engine tests start on pooled ranks."""

from __future__ import annotations

import copy

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import nn

VOCABULARY, WIDTH, LENGTH = 17, 8, 5


class Embed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)

    @property
    def weight(self):
        return self.table.weight

    def forward(self, tokens):
        return self.table(tokens)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def head(module, x):
    return nn.functional.linear(x, module.weight)


def scale(x):
    return x * 1.5


def cross_entropy(logits, labels):
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def make_layers(blocks, tied=True):
    """LayerSpec, TiedLayerSpec with forward_fn, nn.Module and a plain callable."""
    first = TiedLayerSpec("embed", Embed, tied_weight_attr="weight") if tied else LayerSpec(Embed)
    last = (
        TiedLayerSpec("embed", Embed, forward_fn=head, tied_weight_attr="weight")
        if tied
        else LayerSpec(nn.Linear, WIDTH, VOCABULARY)
    )
    return [first, scale, *[LayerSpec(Block) for _ in range(blocks)], nn.LayerNorm(WIDTH), last]


def make_module(ranks, blocks, tied=True, replicas=1, **kwargs):
    torch.manual_seed(7)
    return PipelineModule(
        layers=make_layers(blocks, tied),
        topology=PipeDataParallelTopology(ranks, replicas),
        loss_fn=cross_entropy,
        **kwargs,
    )


def settings(micros, replicas=1, zero=1, precision="fp32", schedule=None, clip=1.0, **pipeline):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": micros,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "adam_w_mode": False, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 0.01}},
        "zero_optimization": {"stage": zero},
        "gradient_clipping": clip,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8}
    if schedule:
        config["pipeline"] = {"schedule": schedule, **pipeline}
    return config


def stream(replica, seed=3):
    """Micro-batches of one replica, without end: next-token prediction on a repeating pattern with noise."""
    generator = torch.Generator().manual_seed(1000 * seed + replica)
    while True:
        tokens = torch.randint(0, VOCABULARY, (2, LENGTH + 1), generator=generator)
        tokens = (tokens // 6) * 6 % VOCABULARY
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def weights(engine):
    return {name: param.detach().float().clone() for name, param in engine.module.named_parameters()}


def optimizer_bytes(engine):
    inner = engine.optimizer
    state = getattr(inner, "optimizer", inner).state
    return sum(
        value.numel() * value.element_size()
        for entry in state.values()
        for value in entry.values()
        if torch.is_tensor(value) and value.numel() > 1
    )


def train(config, ranks, replicas=1, steps=20, blocks=None, tied=True, stop_after_steps=None, module_kwargs=None):
    """Train and return what parity tests compare."""
    import dualpipe_engine

    module = make_module(ranks, blocks or 2 * ranks, tied, replicas, **(module_kwargs or {}))
    replica = module._grid.data_parallel_id
    engine, _, _, scheduler = dualpipe_engine.initialize(model=module, config=copy.deepcopy(config))
    data = stream(replica)
    losses, norms = [], []
    for _ in range(steps):
        losses.append(float(engine.train_batch(data)))
        norm = engine.get_global_grad_norm()
        norms.append(None if norm is None else float(norm))
    evaluated = engine.eval_batch(stream(replica, seed=5), return_logits=True)
    return {
        "losses": losses,
        "norms": norms,
        "lr": scheduler.get_last_lr(),
        "weights": weights(engine),
        "optimizer_bytes": optimizer_bytes(engine),
        "eval_loss": float(evaluated[0]),
        "logits": None if evaluated[1] is None else evaluated[1].clone(),
        "class": type(engine).__name__,
        "samples": engine.global_samples,
    }
