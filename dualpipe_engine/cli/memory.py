"""`dualpipe memory`: what a DeepSpeed configuration costs on each rank, under every schedule."""

from __future__ import annotations

import argparse
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..schedule.jobs.flows import OWN_RECOMPUTED
from ..schedule.jobs.memory import MemoryRow, compare_memory, training_of
from ..schedule.jobs.model_memory import Parts, Shape, model_memory, parts_of
from ..schedule.jobs.model_shape import load_shape
from ..schedule.placement import MOST_RANKS
from ..schedule.plain_json import parse
from .arguments import Commands, add_length, add_stages, finite, refuse, whole

_DESCRIPTION = """\
Bytes of weights, gradients, optimizer state and activations on each rank for every schedule, beside stock 1F1B
(1f1b-deepspeed), computed from a DeepSpeed configuration without running anything.

Precision, ZeRO stage, gradient accumulation dtype, optimizer and "offload_activations" are read from the
configuration. dualpipe holds every stage on two ranks: weights and gradients double, but ZeRO-1 divides the optimizer
state among both, and ZeRO-2 the gradients as well. Stock 1F1B has no ZeRO-2, so its row shows ZeRO-1 then. Not
counted: what lives for one op only (a fresh gradient, buffers of transfers), and what the allocator wastes. With
"offload_optimizer" the optimizer state is in host memory, in a column of its own.

--model takes the parameters and activations of a transformer from its config.json, its stages cut so that ranks have
equal work. Experts, and their optimizer state, are divided by the ranks that share them: the "autoep_size" of the
configuration, or --expert-parallel. Of ranks that share sequences (the "sequence_parallel_size", or
--sequence-parallel) each has a part of the activations. These are those of transformers' layers, or with --own-layers
of those of dualpipe_engine.models, less what the "recompute" of the configuration names; a second table shows what the
largest layer keeps, by parts.
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
    alive = "bytes that one micro-batch keeps from its forward to its backward on 1/N of the model (default: 0)"
    given = [
        parser.add_argument("--params-per-stage", type=_counts, metavar="P[,P..]", help=params),
        parser.add_argument("--activation-bytes", type=_count, default=0, metavar="B", help=alive),
    ]
    whole_model = "deepseek-v3, ..., or a Hugging Face config.json, or its folder, in place of --params-per-stage"
    parser.add_argument("--model", metavar="NAME", help=whole_model)
    size = "sequences of a micro-batch (default: train_micro_batch_size_per_gpu, or 1)"
    shared = "ranks that share the experts of a layer (default: the autoep_size, or 1)"
    parts = "replicas that share each sequence (default: the sequence_parallel_size, or 1)"
    own = "layers of dualpipe_engine.models, whose modules have other names, not those of transformers"
    modelled = [
        parser.add_argument("--own-layers", action="store_true", help=own),
        parser.add_argument("--expert-parallel", type=whole, metavar="N", help=shared),
        parser.add_argument("--micro-batch-size", type=whole, metavar="N", help=size),
        add_length(parser, "tokens (default: 4096)"),
        parser.add_argument("--sequence-parallel", type=whole, metavar="S", help=parts),
    ]
    parser.add_argument(
        "--micro-batches", type=whole, metavar="M", help="micro-batches (default: the gradient_accumulation_steps)"
    )
    parser.add_argument("--replicas", type=whole, default=1, metavar="D", help="data-parallel pipelines (default: 1)")
    add_stages(parser)
    parser.add_argument("--format", choices=("table", "json"), default="table", help="json has every rank's bytes")
    parser.set_defaults(run=partial(_run, given, modelled))


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


def _run(given: list[argparse.Action], modelled: list[argparse.Action], args: argparse.Namespace) -> None:
    from ..viz.memory import memory_data, memory_table, parts_data, parts_table
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
    if args.model is not None:
        refuse(args, given, "with --model, whose config.json says it")
        rows, parts = _of_model(args, config, micro)
    else:
        refuse(args, modelled, "without --model")
        rows, parts = _of_stages(args, config, micro), {}
    if args.format == "json":
        shape = {"ranks": args.ranks, "micro_batches": micro, "replicas": args.replicas}
        sys.stdout.write(json.dumps({**shape, "schedules": memory_data(rows), **parts_data(parts)}) + "\n")
        return
    stage = config.get("zero_optimization", {}).get("stage", 0)
    title = f"ZeRO-{stage}, {args.ranks} ranks x {args.replicas} replicas, {micro} micro-batches"
    wide_console().print(memory_table(rows, title))
    if parts:
        wide_console().print(parts_table(parts))


def _of_stages(args: argparse.Namespace, config: dict[str, Any], micro: int) -> list[MemoryRow]:
    params, section = args.params_per_stage, config.get("pipeline")
    if isinstance(section, dict) and section.get("recompute"):
        raise ConfigError(
            '"recompute" changes what a layer keeps, which --activation-bytes has to say: take the key out, or --model'
        )
    if params is None:
        raise ConfigError("say what a stage holds: --params-per-stage P, or --model with a config.json")
    params = params * args.ranks if len(params) == 1 else params
    return compare_memory(
        training_of(config),
        args.ranks,
        micro,
        params,
        args.activation_bytes,
        args.replicas,
        args.stages_per_rank,
        offload_activations=_offloaded(config),
    )


def _of_model(args: argparse.Namespace, config: dict[str, Any], micro: int) -> tuple[list[MemoryRow], Parts]:
    """Rows, and what a layer keeps under each name of "recompute" and under all."""
    experts, sequences = args.expert_parallel, args.micro_batch_size
    section = config.get("expert_parallel") or {}
    if experts is None:
        experts = section.get("autoep_size", 1) if section.get("enabled") else 1
    if sequences is None:
        sequences = config.get("train_micro_batch_size_per_gpu", 1)
    parts = config.get("sequence_parallel_size", 1) if args.sequence_parallel is None else args.sequence_parallel
    read = {"autoep_size": experts, "train_micro_batch_size_per_gpu": sequences, "sequence_parallel_size": parts}
    for name, value in read.items():
        if type(value) is not int or value < 1:
            raise ConfigError(f"{args.config}: {name} must be a whole number above 0, got {value!r}")
    length = 4096 if args.sequence_length is None else args.sequence_length
    shape = Shape(args.ranks, micro, args.replicas, experts, sequences, length, parts)
    model, training = load_shape(args.model, args.own_layers, parts), training_of(config)
    names = _recomputed(config, args.own_layers)
    rows = model_memory(model, training, shape, args.stages_per_rank, _offloaded(config), names)
    each = [(), *((name,) for name in names), *([names] if len(names) > 1 else [])]
    return rows, {again: parts_of(model, shape, training.weights, again) for again in each}


def _recomputed(config: dict[str, Any], own: bool) -> tuple[str, ...]:
    pipeline = config.get("pipeline")
    names = pipeline.get("recompute", False) if isinstance(pipeline, dict) else False
    if isinstance(names, bool):
        if names and not own:
            raise ConfigError(
                '"recompute": true stands for what layers list, and transformers\' list nothing: give names'
            )
        return OWN_RECOMPUTED if names else ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f'"recompute" must be true, false or a list of names, got {names!r}')
    try:
        for name in names:
            re.compile(name)
    except re.error as error:
        raise ConfigError(f'"recompute": {name!r} is no regular expression: {error}') from None
    return tuple(names)


def _offloaded(config: dict[str, Any]) -> bool | int:
    pipeline = config.get("pipeline")
    away = pipeline.get("offload_activations", False) if isinstance(pipeline, dict) else False
    if not isinstance(away, bool) and (not isinstance(away, int) or away < 1):
        raise ConfigError(f'"offload_activations" must be true, false or a whole number above 0, got {away!r}')
    return away
