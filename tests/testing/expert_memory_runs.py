"""Bytes of an engine that trains a small Qwen3-MoE whose experts two replicas share, beside those computed."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

SEQUENCES, LENGTH, MICROS, WIDTH = 4, 64, 4, 32
BOUNDS = [0, 2, 5]  #: embedding and block 0; blocks 1 and 2 and the head

SIZES = {"vocab_size": 61, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4}
SIZES |= {"num_experts_per_tok": 2, "moe_intermediate_size": 24}


def stream(seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(1, SIZES["vocab_size"], (SEQUENCES, LENGTH), generator=generator)
        yield {"input_ids": ids}, ids


def measure(schedule, zero, precision="fp32"):
    """Measured and computed bytes of this rank, held and sent."""
    import transformers
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    import dualpipe_engine
    from dualpipe_engine.adapters import get_model_adapter
    from dualpipe_engine.schedule.jobs.hardware import load_hardware
    from dualpipe_engine.schedule.jobs.job import Job
    from dualpipe_engine.schedule.jobs.memory import training_of
    from dualpipe_engine.schedule.jobs.model_memory import Shape, layer_activations, stages_memory
    from dualpipe_engine.schedule.jobs.model_shape import shape_of
    from dualpipe_engine.schedule.jobs.stage_times import all_to_all_bytes
    from dualpipe_engine.schedule.timing.costs import CostModel
    from dualpipe_engine.schedule.timing.simulate import peak_bytes
    from dualpipe_engine.testing.held_bytes import held_bytes
    from dualpipe_engine.testing.saved_bytes import SavedBytes

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**SIZES, router_aux_loss_coef=0.0)
    adapter = get_model_adapter(transformers.Qwen3MoeForCausalLM(config))
    topology = PipeDataParallelTopology(2, 2)
    module = PipelineModule(adapter.to_layer_specs(), topology=topology, loss_fn=adapter.loss_fn)
    settings = {
        "train_micro_batch_size_per_gpu": SEQUENCES,
        "gradient_accumulation_steps": MICROS,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": zero},
        "steps_per_print": None,
        "pipeline": {"schedule": schedule, "partition_method": "2,3"},
        "expert_parallel": {"enabled": True, "autoep_size": 2},
    }
    if precision == "bf16":
        settings["bf16"] = {"enabled": True}
    engine, *_ = dualpipe_engine.initialize(model=module, config=settings)
    data = stream(engine.place.replica)
    engine.train_batch(data)
    with SavedBytes(engine.module.parameters()) as saved:
        engine.train_batch(data)
    sent = sum(each.size for each in engine._transfers if each.name in ("dispatch", "combine"))
    measured = replace(held_bytes(engine), activations=saved.peak)
    placement, left = engine.plan.placement, saved.now
    model, kept = shape_of("tiny", config.to_dict()), training_of(settings)
    shape = Shape(2, MICROS, 2, 2, SEQUENCES, LENGTH)
    sizes = [SEQUENCES * LENGTH * layer_activations(layer, kept.weights) for layer in model.layers]
    stages = tuple(sum(sizes[start:stop]) for start, stop in pairwise(BOUNDS))
    peaks = peak_bytes(engine.plan.compute_only(), CostModel(activation_bytes=stages))
    computed = stages_memory(model, BOUNDS, placement, kept, shape, peaks)[engine.place.rank]
    found = {"measured": measured, "computed": computed, "left": left, "sent": sent, "rank": engine.place.rank}
    job = Job(4, 2, 2, MICROS, SEQUENCES, LENGTH, fp8=False, deep_ep=False)
    leaving = [all_to_all_bytes(layer, job, load_hardware("h100")) * kept.weights / 2 for layer in model.layers]
    # Forward and backward of each micro-batch; a pipeline's two ranks run all layers.
    found["leaving"] = 2 * MICROS * sum(leaving) / 2
    engine.destroy()
    return found
