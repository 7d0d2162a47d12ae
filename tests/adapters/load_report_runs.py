"""Runs whose experts' loads are reported, started on pooled ranks."""

from __future__ import annotations

import autoep_runs
import models
import moe_runs
import torch
import training

from dualpipe_engine.models.autoep.layer import SharedMoE
from dualpipe_engine.models.routing import Router
from dualpipe_engine.utils import disable_profiling, enable_profiling

STEPS = 4


def ours():
    """Routers of our transformer."""
    import dualpipe_engine

    module = moe_runs.make_module(moe_runs.config(balancing="loss", dense_blocks=1), 2, 2)
    config = training.settings(4, 2, schedule="dualpipe", load_report_steps=2)
    return dualpipe_engine.initialize(model=module, config=config)[0], training.stream


def shared(folder):
    """Blocks of others, under "expert_parallel", which run again in each backward; with a monitor."""
    import dualpipe_engine

    module = autoep_runs.built("qwen3_moe", 2, 2, activation_checkpoint_interval=1)
    config = autoep_runs.settings("dualpipe", load_report_steps=2, use_reentrant=False)
    config["csv_monitor"] = {"enabled": True, "output_path": folder, "job_name": "job"}
    return dualpipe_engine.initialize(model=module, config=config)[0], lambda replica: models.stream(3 + replica)


def reports(folder):
    return {"ours": reported(*ours()), "shared": reported(*shared(folder))}


def reported(engine, stream):
    """The report of each step, what this rank's routers chose in the last one, and what the profile says."""
    chosen: dict[str, torch.Tensor] = {}

    def note(layer):
        def hook(router, args, output):
            if torch._C._current_graph_task_id() == -1:
                experts = output[1] if isinstance(output, tuple) and not hasattr(output, "experts") else output.experts
                chosen[layer] = chosen.get(layer, 0) + torch.bincount(experts.flatten(), minlength=4)

        return hook

    for number in engine.module.dualpipe_layers:
        layer = engine.module._modules.get(str(number))
        for part in layer.modules() if layer is not None else ():
            if isinstance(part, (Router, SharedMoE)):
                router = part if isinstance(part, Router) else part.router
                router.register_forward_hook(note(str(number)))
    profiler = enable_profiling()
    data = stream(engine.place.replica)
    found = []
    for _ in range(STEPS):
        chosen.clear()
        engine.train_batch(data)
        found.append(engine.expert_load)
    profile = profiler.collect()
    disable_profiling()
    last = dict(chosen)
    engine.eval_batch(data)
    idle = [part.counts.any() for part in engine.module.modules() if hasattr(part, "counts")]
    engine.destroy()
    return {"reports": found, "chosen": last, "profile": profile and profile.expert_load, "counting": any(idle)}
