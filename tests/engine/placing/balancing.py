"""An uneven model, trained with stock cuts and with "pairs", on pooled ranks."""

from __future__ import annotations

import copy

import torch
import training
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import nn
from training import WIDTH, Block, Embed


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, 12 * WIDTH)
        self.down = nn.Linear(12 * WIDTH, WIDTH)
        self.register_buffer("called", torch.zeros(1))

    def forward(self, x):
        if not torch.is_grad_enabled():
            return x + self.down(torch.relu(self.up(x)))
        self.called.fill_(1)
        return x + self.down(torch.relu_(self.up(x)))


#: Parameters in matrices: the estimate of each layer.
ESTIMATE = [0, 0, *[256] * 6, 1536, 1536, 256, 0, 136]


def make_module(ranks, method, replicas=1):
    torch.manual_seed(7)
    layers = [
        TiedLayerSpec("embed", Embed, tied_weight_attr="weight"),
        training.scale,
        *[LayerSpec(Block) for _ in range(6)],
        *[LayerSpec(Wide) for _ in range(2)],
        LayerSpec(Block),
        nn.LayerNorm(WIDTH),
        TiedLayerSpec("embed", Embed, forward_fn=training.head, tied_weight_attr="weight"),
    ]
    return PipelineModule(
        layers=layers,
        topology=PipeDataParallelTopology(ranks, replicas),
        loss_fn=training.cross_entropy,
        partition_method=method,
    )


def train(config, ranks, method="uniform", steps=2):
    import dualpipe_engine

    module = make_module(ranks, method)
    built = {name: param.detach().clone() for name, param in module.named_parameters()}
    engine, *_ = dualpipe_engine.initialize(model=module, config=copy.deepcopy(config))
    start = training.weights(engine)
    data = training.stream(0)
    losses = [float(engine.train_batch(data)) for _ in range(steps)]
    found = {
        "losses": losses,
        "parts": [int(part) for part in engine.module.parts],
        "built": built,
        "start": start,
        "weights": training.weights(engine),
    }
    engine.destroy()
    return found


def measure(ranks, replicas, path):
    """Estimate and measurement, and that the module is untouched; rank 0 keeps the measurement."""
    from dualpipe_engine.engine.auto.layer_probe import measure_layers
    from dualpipe_engine.engine.placing.balance import estimated_costs
    from dualpipe_engine.schedule.cuts.layer_times import write_layer_costs

    module = make_module(ranks, "parameters", replicas)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    seconds = measure_layers(module, next(training.stream(0)), repeats=2)
    after = module.state_dict()
    if module.global_rank == 0:
        write_layer_costs(path, seconds)
    return {
        "estimate": estimated_costs(module),
        "seconds": seconds,
        "untouched": all(torch.equal(value, after[name]) for name, value in before.items())
        and all(param.grad is None for param in module.parameters())
        and torch.equal(state, torch.get_rng_state()),
    }


def estimate_moe(ranks, **model):
    import moe_runs

    from dualpipe_engine.engine.placing.balance import estimated_costs

    return estimated_costs(moe_runs.make_module(moe_runs.config(expert_parallel=1, **model), ranks, 1))
