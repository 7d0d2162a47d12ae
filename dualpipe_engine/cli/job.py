"""`dualpipe compare --model`: memory and speed of a whole job on a cluster."""

from __future__ import annotations

import argparse

from ..errors import ConfigError
from .arguments import print_json, whole


def add_job(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments of a whole job. Returns those beside --model."""
    job = parser.add_argument_group(
        "whole jobs", "estimate memory and speed of a model on a cluster from FLOPs, bandwidths and the simulator"
    )
    job.add_argument("--model", metavar="NAME", help="deepseek-v3, ..., or a Hugging Face config.json, or its folder")
    hardware = "h800 (default), h100, h200, a100, or a .json file"
    return [
        job.add_argument("--gpus", type=whole, metavar="N", help="GPUs of the whole job"),
        job.add_argument("--hardware", metavar="NAME", help=hardware),
        job.add_argument("--expert-parallel", type=whole, metavar="N", help="ranks that share the experts of a layer"),
        job.add_argument("--micro-batch-size", type=whole, metavar="N", help="sequences (default: 1)"),
        job.add_argument("--sequence-length", type=whole, metavar="N", help="tokens (default: 4096, or as published)"),
        job.add_argument(
            "--all-to-all",
            action="store_true",
            help="rows travel once for each expert, not by DeepEP once a rank",
        ),
        job.add_argument("--no-fp8", action="store_true", help="matrix products in bf16 where the hardware has FP8"),
    ]


def estimate_job(args: argparse.Namespace) -> None:
    """Print what the arguments ask for."""
    from ..schedule.jobs.estimate import estimate, make_job
    from ..schedule.jobs.hardware import load_hardware
    from ..schedule.jobs.model_shape import load_shape
    from ..viz.estimates import assumption_table, estimate_data, estimate_table
    from ..viz.terminal import wide_console

    if args.gpus is None:
        raise ConfigError(f"say how many GPUs train {args.model}: --gpus N")
    model, hardware = load_shape(args.model), load_hardware(args.hardware or "h800")
    sequences = 1 if args.micro_batch_size is None else args.micro_batch_size
    counts = (args.gpus, args.ranks, args.expert_parallel, args.micro_batches, sequences)
    job = make_job(model, *counts, args.sequence_length, not args.no_fp8, not args.all_to_all)
    rows = estimate(model, job, hardware, args.stages_per_rank)
    if args.format == "json":
        print_json(estimate_data(rows, model, job, hardware))
        return
    console = wide_console()
    console.print(estimate_table(rows, model, job, hardware))
    console.print(assumption_table(job, hardware))
