"""Bytes of real engines, beside those that `schedule.jobs.memory` computes."""

from __future__ import annotations

from dataclasses import replace

import training


def measure(zero, schedule, ranks, replicas=1, precision="fp32", micros=4):
    """Measured and computed bytes of this rank."""
    import dualpipe_engine
    from dualpipe_engine.schedule.jobs.memory import rank_memory, training_of
    from dualpipe_engine.schedule.placement import LINEAR, Placement
    from dualpipe_engine.testing.held_bytes import gradient_watch, held_bytes

    config = training.settings(micros, replicas, zero, precision, schedule)
    module = training.make_module(ranks, 8 * ranks, tied=False, replicas=replicas)
    data = training.stream(module._grid.data_parallel_id)
    engine, *_ = dualpipe_engine.initialize(model=module, config=config)
    with gradient_watch(engine) as gradients:
        for _ in range(2):
            engine.train_batch(data)
    measured = replace(held_bytes(engine), gradients=max(gradients))
    rank = engine.place.rank if schedule else engine.stage_id
    placement = engine.plan.placement if schedule else Placement(LINEAR, ranks)
    held = sum(param.numel() for param in engine.module.parameters())
    params = [0] * placement.num_stages
    params[placement.stages_of(rank)[0]] = held
    kept = training_of(config) if schedule else training_of(config).stock
    computed = rank_memory(placement, kept, params, replicas)[rank]
    waiting = 0  # gradients that I makes and W's accumulation takes
    if zero == 2 and engine.weight_grad_store is not None:
        waiting = (engine.weight_split.total_numel - engine.weight_split.deferred_numel) * computed.weights // held
    engine.destroy()
    return measured, computed, waiting


def many(cases):
    return {name: measure(**case) for name, case in cases.items()}
