"""`dualpipe memory`: what a DeepSpeed configuration costs on each rank, under every schedule."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from typing import Any

from ..engine.section import PAIRS, check_keys, parse_keys
from ..errors import ConfigError
from ..schedule.cuts.counts import parse_counts
from ..schedule.jobs.asked import Asked
from ..schedule.jobs.flows import OWN_RECOMPUTED, WHOLE, Tiles
from ..schedule.jobs.memory import MemoryRow, compare_memory, is_on, section_of, training_of
from ..schedule.jobs.model_memory import Parts, Shape, model_memory, parts_of
from ..schedule.jobs.model_shape import load_shape
from ..schedule.placement import MOST_RANKS
from ..schedule.plain_json import read_settings
from .arguments import Commands, add_length, add_stages, finite, refuse, whole

#: Keys of the "pipeline" section that change what a layer keeps.
_OF_LAYERS = ("recompute", "activation_checkpoint_interval", "tiled_loss", "tiled_mlp")

_DESCRIPTION = """\
Bytes of weights, gradients, optimizer state and activations on each rank for every schedule, beside stock 1F1B
(1f1b-deepspeed), computed from a DeepSpeed configuration without running anything.

Precision, ZeRO stage, gradient accumulation dtype and optimizer are read from the configuration, and of its
"pipeline" section "stages_per_rank", "activation_cap", "split_backward" and "offload_activations". dualpipe holds
every stage on two ranks: weights and gradients double, but ZeRO-1 divides the optimizer state among both, and ZeRO-2
the gradients as well. Stock 1F1B has no ZeRO-2, so its row shows ZeRO-1 then. Not counted: what lives for one op only
(a fresh gradient, buffers of transfers, a tile), and what the allocator wastes. With "offload_optimizer" the optimizer
state is in host memory, in a column of its own.

--model takes the parameters and activations of a transformer from its config.json, its stages cut so that ranks have
equal work, or by the "partition_method" where that counts layers. Experts, and their optimizer state, are divided by
the ranks that share them: the "autoep_size" of the configuration, or --expert-parallel. Of ranks that share sequences
(the "sequence_parallel_size", or --sequence-parallel) each has a part of the activations. These are those of
transformers' layers, or with --own-layers of those of dualpipe_engine.models, less what "tiled_loss", "tiled_mlp",
"activation_checkpoint_interval" and the names of "recompute" leave to be computed again, with the largest group of
checkpointed layers, as while its backward runs; a second table shows what the largest layer keeps, by parts.
"""


def add_memory(commands: Commands, shape: dict[str, Any]) -> None:
    """Add the subcommand to `commands`, with the parser settings `shape`."""
    about = "bytes on each rank for a DeepSpeed configuration, every schedule beside stock 1F1B"
    parser = commands.add_parser("memory", help=about, description=_DESCRIPTION, **shape)
    parser.add_argument("--config", metavar="FILE", required=True, help="DeepSpeed configuration (JSON, HJSON, base64)")
    parser.add_argument("--ranks", type=whole, metavar="N", required=True, help="pipeline ranks")
    params = (
        "trained parameters of 1/N of the model, such as 8.75e8, or one number for each of the N parts, with commas; "
        "with tensor parallelism those of one tensor rank"
    )
    alive = "bytes that one micro-batch keeps from its forward to its backward on 1/N of the model (default: 0)"
    given = [
        parser.add_argument("--params-per-stage", type=_counts, metavar="P[,P..]", help=params),
        parser.add_argument("--activation-bytes", type=count, default=0, metavar="B", help=alive),
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


def count(text: str) -> int:
    """A number from 0, such as 6e8."""
    return int(finite(text))


def _counts(text: str) -> list[int]:
    try:
        return [count(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of parameters, nor such numbers with commas") from None


def _run(given: list[argparse.Action], modelled: list[argparse.Action], args: argparse.Namespace) -> None:
    from ..viz.memory import memory_data, memory_table, parts_data, parts_table
    from ..viz.terminal import wide_console

    try:
        config = read_settings(args.config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the DeepSpeed configuration {args.config}: {error}") from None
    micro = config.get("gradient_accumulation_steps") if args.micro_batches is None else args.micro_batches
    if type(micro) is not int or micro < 1:
        raise ConfigError(
            f"gradient_accumulation_steps must be a whole number above 0, got {micro!r}: say --micro-batches M"
        )
    if args.ranks > MOST_RANKS:
        raise ConfigError(f"a pipeline has at most {MOST_RANKS:,} ranks, got --ranks {args.ranks}")
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
    stage = section_of(config, "zero_optimization").get("stage", 0)
    title = f"ZeRO-{stage}, {args.ranks} ranks x {args.replicas} replicas, {micro} micro-batches"
    wide_console().print(memory_table(rows, title))
    if parts:
        wide_console().print(parts_table(parts))


def _of_stages(args: argparse.Namespace, config: dict[str, Any], micro: int) -> list[MemoryRow]:
    params, (asked, _) = args.params_per_stage, _asked(args, config)
    section = config.get("pipeline", {})
    if key := next((key for key in _OF_LAYERS if section.get(key)), None):
        raise ConfigError(
            f'"{key}" changes what a layer keeps, which --activation-bytes has to say: take the key out, or --model'
        )
    if params is None:
        raise ConfigError("say what a stage holds: --params-per-stage P, or --model with a config.json")
    params = params * args.ranks if len(params) == 1 else params
    return compare_memory(training_of(config), args.ranks, micro, params, args.activation_bytes, args.replicas, asked)


def _of_model(args: argparse.Namespace, config: dict[str, Any], micro: int) -> tuple[list[MemoryRow], Parts]:
    """Rows, and what a layer keeps under each name of "recompute" and under all, of what tiles leave."""
    experts, sequences = args.expert_parallel, args.micro_batch_size
    section = section_of(config, "expert_parallel")
    if experts is None:
        experts = section.get("autoep_size", 1) if section.get("enabled") else 1
    if section.get("enabled") and (top_k := section.get("top_k", "auto")) != "auto":
        raise ConfigError(
            f'"expert_parallel": {{"top_k": {top_k}}} is not what --model counts by: set the num_experts_per_tok of '
            "its config.json in its place"
        )
    if sequences is None:
        sequences = config.get("train_micro_batch_size_per_gpu", 1)
    parts = config.get("sequence_parallel_size", 1) if args.sequence_parallel is None else args.sequence_parallel
    for name, option, value in (
        ("autoep_size", "--expert-parallel", experts),
        ("train_micro_batch_size_per_gpu", "--micro-batch-size", sequences),
        ("sequence_parallel_size", "--sequence-parallel", parts),
    ):
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} must be a whole number above 0, got {value!r}: say {option} N")
    if is_on(config, "torch_autocast"):
        raise ConfigError(
            '"torch_autocast" keeps activations in two widths, of which --model knows one: take bf16, or '
            "--params-per-stage with --activation-bytes"
        )
    length = 4096 if args.sequence_length is None else args.sequence_length
    shape = Shape(args.ranks, micro, args.replicas, experts, sequences, length, parts)
    (asked, tiles), training = _asked(args, config), training_of(config)
    model, tiled = (load_shape(args.model, args.own_layers, parts, each) for each in (WHOLE, tiles))
    rows, names = model_memory(model, training, shape, asked, tiled), asked.recompute
    each = [(), *((name,) for name in names), *([names] if len(names) > 1 else [])]
    return rows, {again: parts_of(tiled, shape, training.weights, again) for again in each}


def _asked(args: argparse.Namespace, config: dict[str, Any]) -> tuple[Asked, Tiles]:
    """What the "pipeline" section asks of schedules, and what it lets run in pieces."""
    section = config.get("pipeline", {})
    if not isinstance(section, dict):
        raise ConfigError(f'"pipeline" must be a section {{...}} of keys, got {section!r}')
    keys = parse_keys(check_keys(section))
    interval = section.get("activation_checkpoint_interval", 0)
    if type(interval) is not int or interval < 0:
        raise ConfigError(f'"activation_checkpoint_interval" must be a whole number from 0, got {interval!r}')
    cut = parse_counts(keys.partition_method)
    if args.model is not None and cut is None and keys.partition_method not in (None, PAIRS):
        raise ConfigError(
            f'"partition_method": "{keys.partition_method}" needs the layers themselves: leave it out for stages of '
            'equal work, or give the number of layers of each, such as "6,6,5,5"'
        )
    names = keys.recompute
    if args.model is not None and names is True and not args.own_layers:
        raise ConfigError('"recompute": true stands for what layers list, and transformers\' list nothing: give names')
    asked = Asked(
        keys.stages_per_rank if args.stages_per_rank is None else args.stages_per_rank,
        keys.activation_cap,
        keys.split_backward is not False,
        keys.offload_activations,
        tuple(names) if isinstance(names, list) else OWN_RECOMPUTED if names else (),
        interval,
        cut,
    )
    return asked, Tiles(keys.tiled_loss is not None, keys.tiled_mlp is not None)
