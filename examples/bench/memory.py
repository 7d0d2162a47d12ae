"""Measured bytes per rank of weights, gradients and optimizer state: DeepSpeed's own 1F1B and DualPipeV, DualPipe and
DualPipeV under ZeRO-0, 1 and 2.

    python examples/bench/memory.py

Four processes, two pipelines of two ranks each, so both have the same data parallelism of 2. A rank's numbers are those
of the fullest rank; gradients are the most that it holds between ops, optimizer includes fp32 master weights.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from ranks import run_ranks

WIDTH, LAYERS, MICROS = 256, 8, 4
DEEPSPEED = ("1f1b-deepspeed", "dualpipev-deepspeed")


def measure(rank: int, cases: list[tuple[str, str, int]]) -> list[tuple[int, int, int]]:
    """(weights, gradients, optimizer) of the fullest rank for each case (schedule, precision, ZeRO stage)."""
    return [_fullest(*case) for case in cases]


def _fullest(schedule: str, precision: str, zero: int) -> tuple[int, int, int]:
    from deepspeed.pipe import DualPipeVModule, LayerSpec, PipelineModule
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    import dualpipe_engine
    from dualpipe_engine.comm.from_all import from_all
    from dualpipe_engine.testing.held_bytes import gradient_watch, held_bytes

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICROS,
        "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": zero},
        "steps_per_print": None,
        "pipeline": {"schedule": "1f1b-deepspeed" if schedule in DEEPSPEED else schedule},
    }
    if precision == "bf16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"} if zero else {}}
    kind = DualPipeVModule if schedule == "dualpipev-deepspeed" else PipelineModule
    module = kind(
        layers=[LayerSpec(torch.nn.Linear, WIDTH, WIDTH) for _ in range(LAYERS)],
        topology=PipeDataParallelTopology(2, 2),
        loss_fn=torch.nn.functional.mse_loss,
        partition_method="uniform",
    )
    engine, *_ = dualpipe_engine.initialize(model=module, config=config)
    dtype = next(engine.module.parameters()).dtype
    sample = (torch.ones(1, WIDTH, dtype=dtype), torch.zeros(1, WIDTH, dtype=dtype))
    with gradient_watch(engine) as gradients:
        for _ in range(2):
            engine.train_batch(iter([sample] * MICROS))
    mine = replace(held_bytes(engine), gradients=max(gradients))
    engine.destroy()
    fullest = max(from_all(mine), key=lambda memory: memory.total)
    return fullest.weights, fullest.gradients, fullest.optimizer


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    cases = [
        (schedule, precision, zero)
        for precision in ("fp32", "bf16")
        for zero in (0, 1, 2)
        for schedule in (*DEEPSPEED, "dualpipe", "dualpipev")
        if zero < 2 or schedule not in DEEPSPEED
    ]
    rows = run_ranks(measure, 4, cases)
    print("| precision | ZeRO | schedule | weights | gradients | optimizer |")
    print("|---|---|---|---|---|---|")
    for (schedule, precision, zero), sizes in zip(cases, rows, strict=True):
        print(f"| {precision} | {zero} | {schedule} | {' | '.join(f'{size:,}' for size in sizes)} |")
    print("\nDeepSpeed's own pipeline engines refuse ZeRO-2.")


if __name__ == "__main__":
    main()
