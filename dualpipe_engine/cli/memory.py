"""`dualpipe memory`: what a DeepSpeed configuration costs on each rank, under every schedule."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..schedule.jobs.memory import compare_memory, training_of
from ..schedule.placement import MOST_RANKS
from ..schedule.plain_json import parse
from .arguments import Commands, add_stages, finite, whole

_DESCRIPTION = """\
Bytes of weights, gradients, optimizer state and activations on each rank for every schedule, beside stock 1F1B
(1f1b-deepspeed), computed from a DeepSpeed configuration without running anything.

Precision, ZeRO stage, gradient accumulation dtype, optimizer and "offload_activations" are read from the
configuration. dualpipe holds every stage on two ranks: weights and gradients double, but ZeRO-1 divides the optimizer
state among both, and ZeRO-2 the gradients as well. Stock 1F1B has no ZeRO-2, so its row shows ZeRO-1 then. Not counted:
what lives for one op only (a fresh gradient, buffers of transfers), and what the allocator wastes.
"""


def add_memory(commands: Commands, shape: dict[str, Any]) -> None:
    """Add the subcommand to `commands`, with the parser settings `shape`."""
    about = "bytes on each rank for a DeepSpeed configuration, every schedule beside stock 1F1B"
    parser = commands.add_parser("memory", help=about, description=_DESCRIPTION, **shape)
    parser.add_argument("--config", metavar="FILE", required=True, help="DeepSpeed configuration (JSON)")
    parser.add_argument("--ranks", type=whole, metavar="N", required=True, help="pipeline ranks")
    params = (
        "trained parameters of 1/N of the model, such as 8.75e8, or one number for each of the N parts, with commas; "
        "with tensor parallelism those of one tensor rank"
    )
    parser.add_argument("--params-per-stage", type=_counts, metavar="P[,P..]", required=True, help=params)
    alive = "bytes that one micro-batch keeps from its forward to its backward on 1/N of the model (default: 0)"
    parser.add_argument("--activation-bytes", type=_count, default=0, metavar="B", help=alive)
    parser.add_argument(
        "--micro-batches", type=whole, metavar="M", help="micro-batches (default: the gradient_accumulation_steps)"
    )
    parser.add_argument("--replicas", type=whole, default=1, metavar="D", help="data-parallel pipelines (default: 1)")
    add_stages(parser)
    parser.add_argument("--format", choices=("table", "json"), default="table", help="json has every rank's bytes")
    parser.set_defaults(run=_run)


def _count(text: str) -> int:
    number = finite(text)
    if number < 0:
        raise ValueError
    return int(number)


def _counts(text: str) -> list[int]:
    try:
        return [_count(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of parameters, nor such numbers with commas") from None


def _run(args: argparse.Namespace) -> None:
    from ..viz.memory import memory_data, memory_table
    from ..viz.terminal import wide_console

    try:
        config = parse(Path(args.config).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the DeepSpeed configuration {args.config}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{args.config} holds no JSON object")
    micro = args.micro_batches or config.get("gradient_accumulation_steps")
    if not isinstance(micro, int):
        raise ConfigError(f"{args.config} has no gradient_accumulation_steps: say --micro-batches M")
    if not (1 <= args.ranks <= MOST_RANKS and args.replicas >= 1):
        raise ConfigError(f"--ranks and --replicas start at 1, and a pipeline has at most {MOST_RANKS:,} ranks")
    params = args.params_per_stage
    params = params * args.ranks if len(params) == 1 else params
    stages = args.stages_per_rank
    pipeline = config.get("pipeline")
    away = pipeline.get("offload_activations", False) if isinstance(pipeline, dict) else False
    if not isinstance(away, bool) and (not isinstance(away, int) or away < 1):
        raise ConfigError(f'"offload_activations" must be true, false or a whole number above 0, got {away!r}')
    activations = args.activation_bytes
    rows = compare_memory(
        training_of(config), args.ranks, micro, params, activations, args.replicas, stages, offload_activations=away
    )
    if args.format == "json":
        shape = {"ranks": args.ranks, "micro_batches": micro, "replicas": args.replicas}
        sys.stdout.write(json.dumps({**shape, "schedules": memory_data(rows)}) + "\n")
        return
    stage = config.get("zero_optimization", {}).get("stage", 0)
    title = f"ZeRO-{stage}, {args.ranks} ranks x {args.replicas} replicas, {micro} micro-batches"
    wide_console().print(memory_table(rows, title))
