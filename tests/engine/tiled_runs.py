"""Runs on tiles of sequences, started on pooled ranks."""

from __future__ import annotations

import gc

import moe_runs
import torch
import training
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn

from dualpipe_engine.adapters import get_model_adapter
from dualpipe_engine.models.config import MoEConfig
from dualpipe_engine.models.transformer import layers, loss

MODEL = {"q_rank": 8, "dense_blocks": 2, "shared_experts": 1, "expert_parallel": 1}


def train(cases, ranks):
    """For each case losses, norm of the gradients, weights after two steps, and how many layers run on tiles."""
    return {name: _train(ranks=ranks, **case) for name, case in cases.items()}


def _train(ranks, zero, schedule, model=None, precision="fp32", **pipeline):
    import dualpipe_engine

    module = (
        model(ranks) if callable(model) else moe_runs.make_module(moe_runs.config(**(MODEL | (model or {}))), ranks, 1)
    )
    config = training.settings(4, zero=zero, schedule=schedule, precision=precision, **pipeline)
    engine, *_ = dualpipe_engine.initialize(model=module, config=config)
    data = _masked(training.stream(0))
    found = {
        "losses": [float(engine.train_batch(data)) for _ in range(2)],
        "evaluated": float(engine.eval_batch(data)),
        "norm": float(engine.get_global_grad_norm()),
        "weights": training.weights(engine),
        "whole": [name for name, why in engine.weight_split.not_deferred if why == "tiled module"]
        if engine._store is not None
        else None,
    }
    engine.destroy()
    return found


def _masked(data):
    """Labels of which the first half does not count."""
    for tokens, labels in data:
        masked = labels.clone()
        masked[0, :3] = -100
        yield tokens, masked


def of_transformers(ranks, routed):
    """A small model with grouped-query attention; `routed` with an auxiliary loss over its routers."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(5)
    sizes = {"vocab_size": training.VOCABULARY, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    if routed:
        more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
        whole = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**sizes, **heads, **more, mlp_only_layers=[0], output_router_logits=True)
        )
    else:
        whole = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
    adapter = get_model_adapter(whole)
    return PipelineModule(adapter.to_layer_specs(), num_stages=ranks, loss_fn=adapter.loss_fn)


class Capped(nn.Linear):
    """A head that does something to its logits."""

    @property
    def projection(self):
        return self.inner

    def __init__(self):
        super().__init__(training.WIDTH, training.WIDTH)
        self.inner = nn.Linear(training.WIDTH, training.VOCABULARY)

    def forward(self, x):
        return torch.tanh(self.inner(super().forward(x)))


class Mixing(nn.Module):
    """A feed-forward layer in name only."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x)


class Mean(nn.Module):
    def forward(self, x):
        return x + x.mean(dim=1, keepdim=True)


def refused(mlp=None, head=None, loss_fn=loss, evaluate=False, **pipeline):
    """Start and train a model that tiles do not fit."""
    import dualpipe_engine

    middle = [LayerSpec(Mixing, mlp)] if mlp is not None else []
    specs = [LayerSpec(training.Embed), LayerSpec(training.Block), *middle, LayerSpec(training.Block)]
    specs.append(LayerSpec(head) if head else LayerSpec(nn.Linear, training.WIDTH, training.VOCABULARY))
    module = PipelineModule(specs, num_stages=2, loss_fn=loss_fn)
    config = training.settings(4, schedule="1f1b", **pipeline)
    engine, *_ = dualpipe_engine.initialize(model=module, config=config)
    engine.train_batch(training.stream(0))


def logits():
    """Ask for logits that never exist."""
    import dualpipe_engine

    module = moe_runs.make_module(moe_runs.config(**MODEL), 2, 1)
    engine, *_ = dualpipe_engine.initialize(model=module, config=training.settings(4, schedule="1f1b", tiled_loss=2))
    engine.eval_batch(training.stream(0), return_logits=True)


def peak(tiles, length=4096, vocabulary=150_000, hidden=16):
    """The loss, and by how many bytes the process grew at most, while the last stage ran F and B."""
    from dualpipe_engine.runtime.chunk import StageChunk
    from dualpipe_engine.runtime.tiles import Tiles

    torch.manual_seed(0)
    spec = layers(MoEConfig(vocabulary=vocabulary, hidden=hidden, blocks=1))[-1]
    head = spec.build()
    loss_fn = loss.tiled(Tiles(head.projection, tiles)) if tiles else loss
    chunk = StageChunk(head, 1, is_last=True, loss_fn=loss_fn)
    x, labels = torch.randn(1, length, hidden), torch.randint(vocabulary, (1, length))
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    value = float(chunk.forward(0, x.requires_grad_(), labels))
    chunk.backward(0, None)
    return value, _status("VmHWM") - before, float(head.out.weight.grad.abs().sum())


def _status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))
