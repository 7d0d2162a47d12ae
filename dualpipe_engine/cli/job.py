"""`dualpipe compare --model`: memory and speed of a whole job on a cluster."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .arguments import add_length, finite, print_json, whole

if TYPE_CHECKING:
    from ..schedule.jobs.ladder import Work


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
        add_length(job, "tokens (default: 4096, or as published)"),
        job.add_argument("--sequence-parallel", type=whole, metavar="S", help="replicas that share each sequence"),
        job.add_argument(
            "--all-to-all",
            action="store_true",
            help="rows travel once for each expert, not by DeepEP once a rank",
        ),
        job.add_argument(
            "--memory",
            type=finite,
            metavar="BYTES",
            help="of a device, such as 80e9: the cheapest recomputation and offload that make each schedule fit",
        ),
        job.add_argument(
            "--own-layers",
            action="store_true",
            help="the layers of dualpipe_engine.models, not those of transformers",
        ),
        job.add_argument("--no-fp8", action="store_true", help="matrix products in bf16 where the hardware has FP8"),
    ]


def estimate_job(args: argparse.Namespace) -> None:
    """Print what the arguments ask for."""
    from ..schedule.jobs.estimate import estimate
    from ..schedule.jobs.hardware import load_hardware
    from ..schedule.jobs.job import make_job
    from ..schedule.jobs.ladder import Work
    from ..schedule.jobs.model_shape import load_shape
    from ..viz.estimates import assumption_table, estimate_data, estimate_table
    from ..viz.terminal import wide_console

    if args.gpus is None:
        raise ConfigError(f"say how many GPUs train {args.model}: --gpus N")
    model = load_shape(args.model, args.own_layers, 1 if args.sequence_parallel is None else args.sequence_parallel)
    hardware = load_hardware("h800" if args.hardware is None else args.hardware)
    sequences = 1 if args.micro_batch_size is None else args.micro_batch_size
    counts = (args.gpus, args.ranks, args.expert_parallel, args.micro_batches, sequences)
    job = make_job(model, *counts, args.sequence_length, not args.no_fp8, not args.all_to_all)
    if args.all_to_all and job.experts == 1:
        raise ConfigError(f"no ranks share experts of {args.model} here: leave --all-to-all out")
    if args.memory is not None:
        _climb(args, Work(model, job, hardware, args.memory, args.own_layers))
        return
    rows = estimate(model, job, hardware, args.stages_per_rank)
    if args.format == "json":
        print_json(estimate_data(rows, model, job, hardware))
        return
    console = wide_console()
    console.print(estimate_table(rows, model, job, hardware))
    console.print(assumption_table(job, hardware, args.own_layers))


def _climb(args: argparse.Namespace, work: Work) -> None:
    """Print the memory ladder of every schedule."""
    from ..schedule.jobs.ladder import chosen, climb
    from ..schedule.orders.registry import tried
    from ..viz.estimates import assumption_table
    from ..viz.ladder import cuts, ladder_data, reason, rungs_table, schedules_table
    from ..viz.terminal import tracked, wide_console

    if not work.memory:
        raise ConfigError("--memory must be above 0: say the bytes of a device, such as 80e9")
    stages = args.stages_per_rank
    ladders = tracked(climb(work, stages), len(tried(stages)), "schedules")
    if args.format == "json":
        print_json(ladder_data(ladders, work))
        return
    console = wide_console()
    console.print(schedules_table(ladders, work))
    if (first := chosen(ladders)) is not None:
        console.print(rungs_table(first))
        for line in cuts(first):
            console.print(line, soft_wrap=True, highlight=False)
    console.print(reason(ladders, work), soft_wrap=True, highlight=False)
    console.print(assumption_table(work.job, work.hardware, work.own))
