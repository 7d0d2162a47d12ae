"""`dualpipe compare`: every schedule side by side."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from typing import Any

from ..errors import ConfigError
from ..schedule.cuts.fastest import compare_cuts
from ..schedule.jobs.under_memory import Asked, Fitted, under_memory
from ..schedule.passes.verify import verify
from ..schedule.search.compare import compare, fastest
from ..schedule.search.job_costs import Measurement
from ..schedule.timing.costs import CostModel
from .arguments import Commands, add_stages, add_work, finite, layer_costs, print_json, refuse, work
from .job import add_job, estimate_job

_LAYERS_HELP = (
    "time of each layer's forward and backward, as numbers (0.5,1x24,3: 1x24 is 24 layers of 1) or a .json file with a "
    "list: shows what balanced stages win over equal counts of layers; --costs then says how a layer's time divides"
)


def add_compare(commands: Commands, shape: dict[str, Any]) -> None:
    """Add the subcommand to `commands`, with the parser settings `shape`."""
    parser = commands.add_parser("compare", help="every schedule side by side on the same model and batch", **shape)
    _, _, *simulated = add_work(parser, plan_file=False)
    cap = (
        "activations that a rank may hold, in those of 1/N of the model (default: what each schedule is known for); "
        "zbv, vhalf and vmin keep any from 1"
    )
    simulated += [
        parser.add_argument("--activation-cap", type=finite, metavar="K", help=cap),
        parser.add_argument("--layer-costs", type=layer_costs, metavar="T,T,..", help=_LAYERS_HELP),
    ]
    add_stages(parser)
    parser.add_argument("--format", choices=("table", "json"), default="table", help="default: table")
    estimated = add_job(parser)
    parser.set_defaults(run=partial(_run, simulated, estimated))


def _run(simulated: list[argparse.Action], estimated: list[argparse.Action], args: argparse.Namespace) -> None:
    from ..viz.fitting import fitting_data, fitting_table, lower_bounds
    from ..viz.summary import comparison_table
    from ..viz.terminal import wide_console

    if args.model is not None:
        refuse(args, simulated, "with --model, whose estimate has costs and memory of its own")
        estimate_job(args)
        return
    refuse(args, estimated, "without --model")
    costs, job = work(args)
    if args.ranks is None:
        raise ConfigError("say how many ranks: --ranks N, or --costs with a measured file")
    if args.micro_batches is None:
        raise ConfigError("say how many micro-batches: --micro-batches M")
    if args.layer_costs is not None:
        _compare_cuts(args, costs)
        return
    rows = _rows(args, costs, job)
    for row in rows:
        if row.plan:
            verify(row.plan)
    bounds = lower_bounds(rows, replace(job or Measurement(costs, args.ranks, 0), costs=costs))
    if args.format == "table":
        title = f"{args.ranks} ranks, {args.micro_batches} micro-batches"
        wide_console().print(comparison_table(rows, bounds, title))
        if job is not None and any(row.tried for row in rows):
            wide_console().print(fitting_table(rows, job.memory_bytes))
        return
    first = fastest(rows)
    print_json(
        {
            "ranks": args.ranks,
            "micro_batches": args.micro_batches,
            "schedules": [
                {
                    "schedule": row.schedule,
                    "stages_per_rank": row.stages_per_rank,
                    "feasible": row.feasible,
                    "reason": row.reason,
                    "parameter_copies": row.parameter_copies,
                    "makespan": row.makespan if row.feasible else None,
                    "bubble": row.bubble if row.feasible else None,
                    "peak_activations": row.peak_activations if row.feasible else None,
                    "lower_bound": bounds.get(row.name),
                    "reduction": row.reduction if row.feasible else None,
                    "step": row.total if row.feasible else None,
                    "memory": row.memory,
                    "fastest": row is first,
                    **fitting_data(row),
                }
                for row in rows
            ],
        }
    )


def _rows(args: argparse.Namespace, costs: CostModel, job: Measurement | None) -> list[Fitted]:
    """Every schedule; on a measured job as "auto" sees them."""
    stages = args.stages_per_rank
    costs.check(args.ranks)
    if job is None:
        rows = compare(
            args.ranks, args.micro_batches, costs, args.activation_cap, args.optimize, stages_per_rank=stages
        )
        return [Fitted.of(row) for row in rows]
    asked = Asked(
        args.micro_batches, activation_cap=args.activation_cap, optimize=args.optimize, stages_per_rank=stages
    )
    return under_memory(replace(job, costs=costs), asked)


def _compare_cuts(args: argparse.Namespace, costs: CostModel) -> None:
    from ..viz.cuts import cut_data, cut_table
    from ..viz.terminal import wide_console

    layers = args.layer_costs
    shape = args.ranks, args.micro_batches
    rows = compare_cuts(layers, *shape, costs, args.activation_cap, args.optimize, args.stages_per_rank)
    for cut in (cut for row in rows for cut in (row.equal, row.best) if cut):
        verify(cut.plan)
    if args.format == "table":
        title = f"{len(layers)} layers, {args.ranks} ranks, {args.micro_batches} micro-batches"
        wide_console().print(cut_table(rows, title))
        return
    sizes = {"ranks": args.ranks, "micro_batches": args.micro_batches, "layers": len(layers)}
    print_json({**sizes, "schedules": cut_data(rows)})
