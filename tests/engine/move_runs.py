"""Runs that go on with another number of pipeline ranks, replicas and ranks that share experts, on pooled ranks."""

from __future__ import annotations

from pathlib import Path

import moe_runs
import torch
import torch.distributed as dist
import training
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

from dualpipe_engine.models.transformer import layers, loss

MICROS = 8  #: of all replicas, in a step
EPS = 1e-3  #: of Adam: no gradient that is zero but for rounding takes a step
SIZES = {"blocks": 6, "sequence_loss": 0.1}


def stream(replica, replicas, skip):
    """The micro-batches of a replica, from step `skip` on: of each step all replicas together read the same."""
    data, each, number = training.stream(0), MICROS // replicas, 0
    while True:
        for micro in range(MICROS):
            pair = next(data)
            if number >= skip and micro // each == replica:
                yield pair
        number += 1


def ours(ranks, replicas, experts, schedule, zero):
    config = training.settings(MICROS // replicas, replicas, zero=zero, schedule=schedule)
    return moe_runs.make_module(moe_runs.config(expert_parallel=experts, **SIZES), ranks, replicas), config


def predicting(ranks, replicas, experts, schedule, zero):
    """DeepSeek-V3 with groups of experts, and one further token predicted."""
    config = training.settings(MICROS // replicas, replicas, zero=zero, schedule=schedule)
    config["optimizer"]["params"]["eps"] = EPS
    model = moe_runs.config(expert_parallel=experts, mtp_depth=1, experts=8, groups=4, kept_groups=2, **SIZES)
    return moe_runs.make_module(model, ranks, replicas), config


def mixed(ranks, replicas, experts, schedule, zero):
    """Every other layer shares its experts between half as many ranks."""
    config = training.settings(MICROS // replicas, replicas, zero=zero, schedule=schedule)
    topology = PipeDataParallelTopology(ranks, replicas)
    torch.manual_seed(7)
    replica = topology.get_coord(dist.get_rank()).data
    all_of_them, half = (
        layers(moe_runs.config(expert_parallel=size, **SIZES), replica) for size in (experts, max(1, experts // 2))
    )
    specs = [pair[number % 2] for number, pair in enumerate(zip(all_of_them, half, strict=True))]
    return PipelineModule(layers=specs, topology=topology, loss_fn=loss), config


def grouped(module):
    """Three groups of parameters, two of which have experts."""
    named = [(name, param, ".experts." in name) for name, param in module.named_parameters()]
    chosen = [name.partition(".")[0] in ("1", "2", "4") for name, *_ in named]
    experts = [
        [param for (_, param, of), one in zip(named, chosen, strict=True) if of and one == which] for which in (0, 1)
    ]
    others = [param for _, param, of in named if not of]
    return [
        {"params": experts[0], "weight_decay": 0.3},
        {"params": others, "weight_decay": 0.0},
        {"params": experts[1], "weight_decay": 0.6},
    ]


def adapted(ranks, replicas, experts, schedule, zero):
    """Mixtral by AutoEP."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from dualpipe_engine.adapters import get_model_adapter

    sizes = {"vocab_size": training.VOCABULARY, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = MixtralConfig(**sizes, **heads, initializer_range=0.3)
    torch.manual_seed(5)
    adapter = get_model_adapter(MixtralForCausalLM(config))
    topology = PipeDataParallelTopology(ranks, replicas)
    module = PipelineModule(adapter.to_layer_specs(), topology=topology, loss_fn=adapter.loss_fn)
    settings = training.settings(MICROS // replicas, replicas, zero=zero, schedule=schedule)
    return module, settings | {"expert_parallel": {"enabled": True, "autoep_size": experts}}


def hop(model, ranks, replicas, experts, schedule, folder, load=None, save=None, steps=2, skip=0, zero=1):
    """Losses of some steps; what is saved is converted too."""
    import dualpipe_engine
    from dualpipe_engine.engine.checkpoint.convert import convert

    make = {"ours": ours, "predicting": predicting, "mixed": mixed, "adapted": adapted}[model]
    module, config = make(ranks, replicas, experts, schedule, zero)
    if load is not None:
        config["checkpoint"] = {"load_universal": load.endswith("u")}
        with torch.no_grad():
            for part in module.state_dict().values():  # what a checkpoint has
                part.fill_(0.5 if part.is_floating_point() else 0)
    params = grouped(module) if model == "mixed" else None
    engine, *_ = dualpipe_engine.initialize(model=module, config=config, model_parameters=params)
    if load is not None:
        engine.load_checkpoint(folder, tag=load)
    data = stream(engine.place.replica, replicas, skip)
    losses = [float(engine.train_batch(data)) for _ in range(steps)]
    if save is not None:
        engine.save_checkpoint(folder, tag=save)
        if dist.get_rank() == 0:
            convert(Path(folder, save), Path(folder, f"{save}u"))
        dist.barrier()
    engine.destroy()
    return losses


def hops(links):
    return [hop(**link) for link in links]
