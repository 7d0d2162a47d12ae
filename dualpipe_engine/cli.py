"""The `dualpipe` command: print, draw and compare schedules. Works without torch."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from . import __version__
from .cli_export import add_export
from .cli_memory import add_memory
from .errors import ConfigError, DualPipeError
from .schedule.bound import plan_bound
from .schedule.choose import SCHEDULES, compare, fastest, make_plan, placement_of
from .schedule.collector import collector_paused
from .schedule.costs import CostModel
from .schedule.layer_costs import parse_layer_costs
from .schedule.lower import lower
from .schedule.measurement import Measurement
from .schedule.plan import Plan
from .schedule.recut import compare_cuts
from .schedule.simulate import peak_activations, simulate
from .schedule.verify import verify

_FILES = (".csv", ".json")

_DESCRIPTION = """\
Pipeline schedules as values: print one, draw one, compare all of them. Every plan is verified before it is shown.

A pipeline cuts a model into stages, one rank (device) a stage or two. In each batch every micro-batch passes all
stages forward (F) and back (B). A full backward B is made of I, the gradient of the stage's input, and W, the gradient
of its weights; only I keeps the previous stage waiting. F&B is one forward and one backward that a rank runs together.
The makespan is the time from the first op to the last; the bubble of a rank is the part of it in which the rank
computes nothing.
"""

_EPILOG = """\
examples:
  dualpipe plan --schedule dualpipe --ranks 8 --micro-batches 20
  dualpipe plan --schedule dualpipev --ranks 4 --micro-batches 10 --format json > plan.json
  dualpipe plan --schedule plan.json
  dualpipe draw --schedule dualpipe --ranks 8 --micro-batches 20 --out schedule.svg
  dualpipe draw trace.json
  dualpipe doctor dualpipe_profile.json
  dualpipe compare --ranks 8 --micro-batches 32 --costs 1,1,1,2.25 --optimize
  dualpipe compare --ranks 8 --micro-batches 32 --layer-costs 0.2,1x40,3
  dualpipe compare --model deepseek-v3 --gpus 2048 --hardware h800
  dualpipe export --checkpoint runs/gpt --out exported
  dualpipe memory --config ds.json --ranks 8 --params-per-stage 8.75e8 --activation-bytes 6e8

exit codes: 0 done; 1 nobody reads the output (a closed pipe); 2 the request cannot work (the reason is on stderr)
"""

_COSTS_HELP = (
    "time of a forward, of the input part and of the weight part of a backward, and of an overlapped F&B pair, on 1/N "
    "of the model (rank count N; dualpipev and zbv run it as two halves). Any unit: all times shown are in that unit. "
    'Without FB, pairs take F+I+W: no overlap (default: 1,1,1,3). Or the file that "schedule": "auto" measured'
)


_LAYERS_HELP = (
    "time of each layer's forward and backward, as numbers (0.5,1x24,3: 1x24 is 24 layers of 1) or a .json file with a "
    "list: shows what balanced stages win over equal counts of layers; --costs then says how a layer's time divides"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        with collector_paused():
            args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the interpreter's last flush is quiet
        return 1
    except DualPipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    shape: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": _EPILOG}
    parser = argparse.ArgumentParser(prog="dualpipe", description=_DESCRIPTION, **shape)
    parser.add_argument("--version", action="version", version=f"dualpipe_engine {__version__}")
    commands = parser.add_subparsers(metavar="plan|draw|compare|memory|doctor|export", required=True)

    plan = commands.add_parser("plan", help="print the ops of every rank, with makespan and bubble", **shape)
    _add_schedule(plan)
    plan.add_argument("--format", choices=("table", "json", "csv"), default="table", help="default: table")
    plan.add_argument("--with-comm", action="store_true", help="show sends, receives, gradient reduction and step too")
    plan.set_defaults(run=_run_plan)

    draw = commands.add_parser("draw", help="draw a schedule over time: terminal, SVG or PNG", **shape)
    draw.add_argument("file", nargs="?", help="a trace (Chrome JSON) of a measured batch, or a plan file")
    _add_schedule(draw)
    draw.add_argument("--out", metavar="FILE", help="write FILE, .svg or .png; without it: draw in the terminal")
    draw.set_defaults(run=_run_draw)

    side = commands.add_parser("compare", help="every schedule side by side on the same model and batch", **shape)
    _add_work(side, plan_file=False)
    cap = "activations that a rank may hold, in those of 1/N of the model (default: what each schedule is known for)"
    side.add_argument("--activation-cap", type=_finite, metavar="K", help=cap)
    side.add_argument("--layer-costs", type=_layer_costs, metavar="T,T,..", help=_LAYERS_HELP)
    side.add_argument("--format", choices=("table", "json"), default="table", help="default: table")
    _add_job(side)
    side.set_defaults(run=_run_compare)
    add_memory(commands, shape)

    doctor = commands.add_parser("doctor", help="say what costs most in a profile, and what to change", **shape)
    doctor.add_argument("profile", help="what get_profiler().save_to_file() wrote")
    doctor.add_argument("--format", choices=("table", "json"), default="table", help="default: table")
    doctor.set_defaults(run=_run_doctor)
    add_export(commands, shape)
    return parser


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--schedule", metavar="S", help=f"{', '.join(SCHEDULES)}, or a plan file (.csv, .json)")
    _add_work(parser, plan_file=True)
    cap = "(stage, micro-batch) activations that a rank may hold (default: what the schedule is known for)"
    parser.add_argument("--activation-cap", type=int, metavar="K", help=cap)


def _add_job(parser: argparse.ArgumentParser) -> None:
    job = parser.add_argument_group(
        "whole jobs", "estimate memory and speed of a model on a cluster from FLOPs, bandwidths and the simulator"
    )
    job.add_argument("--model", metavar="NAME", help="deepseek-v3, ..., or a Hugging Face config.json")
    job.add_argument("--gpus", type=int, metavar="N", help="GPUs of the whole job")
    job.add_argument("--hardware", default="h800", help="h800 (default), h100, h200, a100, or a .json file")
    job.add_argument("--expert-parallel", type=int, metavar="N", help="ranks that share the experts of a layer")
    job.add_argument("--micro-batch-size", type=int, default=1, metavar="N", help="sequences (default: 1)")
    job.add_argument("--sequence-length", type=int, metavar="N", help="tokens (default: 4096, or as published)")
    job.add_argument("--no-fp8", action="store_true", help="matrix products in bf16 where the hardware has FP8")


def _add_work(parser: argparse.ArgumentParser, plan_file: bool) -> None:
    where = " (a plan file has its own)" if plan_file else ""
    measured = where or " (measured --costs have their own)"
    parser.add_argument("--ranks", type=int, metavar="N", help=f"pipeline ranks{measured}")
    parser.add_argument(
        "--micro-batches", type=int, metavar="M", help=f"micro-batches of one pipeline in a batch{where}"
    )
    parser.add_argument("--costs", type=_costs, default=CostModel(fb=3.0), metavar="F,I,W[,FB]", help=_COSTS_HELP)
    comm = "time of one transfer between two ranks, in the unit of --costs (default: 0, or the measured one)"
    parser.add_argument("--comm", type=_finite, metavar="C", help=comm)
    best = "search for the order with the smallest makespan under the costs, instead of the reference order"
    parser.add_argument("--optimize", action="store_true", help=best)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


def _costs(text: str) -> CostModel | Measurement:
    if text.endswith(".json"):
        try:
            return Measurement.load(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    try:
        f, i, w, *pair = map(_finite, text.split(","))
        (fb,) = pair or (f + i + w,)
        return CostModel(f, i, w, fb)
    except ValueError:
        message = f"{text!r} is not F,I,W or F,I,W,FB: 3 or 4 numbers, such as 1,1,1,2.25, none negative"
        raise argparse.ArgumentTypeError(message) from None


def _layer_costs(text: str) -> list[float]:
    try:
        return parse_layer_costs(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _work(args: argparse.Namespace) -> tuple[CostModel, Measurement | None]:
    """The costs that the arguments name, with the measurement that they come from; fills in its number of ranks."""
    job = args.costs if isinstance(args.costs, Measurement) else None
    costs = job.costs if job else args.costs
    if job and args.ranks is None:
        args.ranks = job.ranks
    return (costs if args.comm is None else replace(costs, comm=args.comm)), job


def _make(args: argparse.Namespace) -> tuple[Plan, CostModel]:
    """The verified plan that the arguments ask for, and the costs of its stages."""
    costs, _ = _work(args)
    if args.schedule is None:
        raise ConfigError(f"say which schedule: --schedule with {', '.join(SCHEDULES)} or a plan file")
    if args.schedule.endswith(_FILES):
        plan = Plan.load(args.schedule)
        for option, asked, found in (
            ("--ranks", args.ranks, plan.placement.num_ranks),
            ("--micro-batches", args.micro_batches, plan.num_micro),
        ):
            if asked not in (None, found):
                raise ConfigError(f"{args.schedule} is a plan with {option} {found}, not {asked}: leave {option} out")
        if args.optimize:
            raise ConfigError(f"{args.schedule} is a finished plan: leave --optimize out")
        costs = costs.for_placement(plan.placement)
    else:
        if args.ranks is None or args.micro_batches is None:
            raise ConfigError(f"schedule {args.schedule!r} needs --ranks N and --micro-batches M")
        costs = costs.for_placement(placement_of(args.schedule, args.ranks))
        plan = make_plan(args.schedule, args.ranks, args.micro_batches, costs, args.optimize, args.activation_cap)
    verify(plan, activation_cap=args.activation_cap)
    return plan, costs


def _run_plan(args: argparse.Namespace) -> None:
    plan, costs = _make(args)
    shown = plan
    if not args.with_comm:
        shown = plan.compute_only()
    elif not plan.has_comm():
        shown = lower(plan.compute_only())
        verify(shown, activation_cap=args.activation_cap)
    if args.format == "csv":
        sys.stdout.write(shown.to_csv())
        return
    timeline, peaks, bound = simulate(plan, costs), peak_activations(plan), plan_bound(plan, costs)
    if args.format == "json":
        _print_json(
            {
                "schedule": plan.schedule,
                "placement": plan.placement.name,
                "ranks": plan.placement.num_ranks,
                "micro_batches": plan.num_micro,
                "makespan": timeline.makespan,
                "bubble": timeline.bubble(),
                "peak_activations": peaks,
                "lower_bound": bound,
                "programs": shown.texts(),
            }
        )
        return
    from .viz.cells import headline
    from .viz.summary import plan_table
    from .viz.terminal import wide_console

    console = wide_console()
    console.print(plan_table(shown))
    facts = f"lower bound {bound:.4g}, at most {max(peaks)} activations alive on a rank; verified"
    console.print(f"{_title(plan)}: {headline(timeline)}, {facts}", highlight=False, markup=False)


def _run_draw(args: argparse.Namespace) -> None:
    from .viz.chrome import read_chrome
    from .viz.figure import save_figure
    from .viz.terminal import draw_terminal, wide_console

    if args.file and args.schedule:
        raise ConfigError(f"draw either {args.file} or --schedule {args.schedule}, not both")
    if args.file and _is_trace(args.file):
        timeline, title, unit = read_chrome(args.file), Path(args.file).name, "s"
    else:
        args.schedule = args.file or args.schedule
        plan, costs = _make(args)
        timeline, title, unit = simulate(plan, costs), _title(plan), ""
    if args.out:
        save_figure(args.out, timeline, title, unit)
    else:
        draw_terminal(timeline, wide_console(), title, unit)


def _is_trace(path: str) -> bool:
    """Whether a .json file is no plan; what cannot be read is left to `Plan.load`, which says why."""
    if not path.endswith(".json"):
        return False
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return False
    return not (isinstance(data, dict) and "programs" in data)


def _run_compare(args: argparse.Namespace) -> None:
    from .viz.summary import comparison_table
    from .viz.terminal import wide_console

    if args.model is not None:
        _estimate(args)
        return
    costs, job = _work(args)
    if args.ranks is None:
        raise ConfigError("say how many ranks: --ranks N, or --costs with a measured file")
    if args.micro_batches is None:
        raise ConfigError("say how many micro-batches: --micro-batches M")
    if args.layer_costs is not None:
        _compare_cuts(args, costs)
        return
    rows = compare(args.ranks, args.micro_batches, costs, args.activation_cap, args.optimize, job=job)
    for row in rows:
        if row.plan:
            verify(row.plan)
    bounds = {row.schedule: plan_bound(row.plan, costs.for_placement(row.plan.placement)) for row in rows if row.plan}
    if args.format == "table":
        title = f"{args.ranks} ranks, {args.micro_batches} micro-batches"
        wide_console().print(comparison_table(rows, bounds, title))
        return
    first = fastest(rows)
    _print_json(
        {
            "ranks": args.ranks,
            "micro_batches": args.micro_batches,
            "schedules": [
                {
                    "schedule": row.schedule,
                    "feasible": row.feasible,
                    "reason": row.reason,
                    "parameter_copies": row.parameter_copies,
                    "makespan": row.makespan if row.feasible else None,
                    "bubble": row.bubble if row.feasible else None,
                    "peak_activations": row.peak_activations if row.feasible else None,
                    "lower_bound": bounds.get(row.schedule),
                    "reduction": row.reduction if row.feasible else None,
                    "step": row.total if row.feasible else None,
                    "memory": row.memory,
                    "fastest": row is first,
                }
                for row in rows
            ],
        }
    )


def _run_doctor(args: argparse.Namespace) -> None:
    from .profiling.doctor import diagnose
    from .profiling.profile import read_profile
    from .profiling.report import print_findings, print_summary

    profile = read_profile(args.profile)
    findings = diagnose(profile)
    if args.format == "json":
        _print_json({"step": profile.step, "findings": [asdict(finding) for finding in findings]})
        return
    print_summary(profile)
    print_findings(profile, findings)


def _compare_cuts(args: argparse.Namespace, costs: CostModel) -> None:
    from .viz.cuts import cut_data, cut_table
    from .viz.terminal import wide_console

    layers = args.layer_costs
    rows = compare_cuts(layers, args.ranks, args.micro_batches, costs, args.activation_cap, args.optimize)
    for cut in (cut for row in rows for cut in (row.equal, row.best) if cut):
        verify(cut.plan)
    if args.format == "table":
        title = f"{len(layers)} layers, {args.ranks} ranks, {args.micro_batches} micro-batches"
        wide_console().print(cut_table(rows, title))
        return
    shape = {"ranks": args.ranks, "micro_batches": args.micro_batches, "layers": len(layers)}
    _print_json({**shape, "schedules": cut_data(rows)})


def _estimate(args: argparse.Namespace) -> None:
    from .schedule.estimate import estimate, make_job
    from .schedule.hardware import load_hardware
    from .schedule.model_shape import load_shape
    from .viz.estimates import assumption_table, estimate_data, estimate_table
    from .viz.terminal import wide_console

    if args.gpus is None:
        raise ConfigError(f"say how many GPUs train {args.model}: --gpus N")
    model, hardware = load_shape(args.model), load_hardware(args.hardware)
    counts = (args.gpus, args.ranks, args.expert_parallel, args.micro_batches, args.micro_batch_size)
    job = make_job(model, *counts, args.sequence_length, not args.no_fp8)
    rows = estimate(model, job, hardware)
    if args.format == "json":
        _print_json(estimate_data(rows, model, job, hardware))
        return
    console = wide_console()
    console.print(estimate_table(rows, model, job, hardware))
    console.print(assumption_table(job, hardware))


def _title(plan: Plan) -> str:
    return f"{plan.schedule}, {plan.placement.num_ranks} ranks, {plan.num_micro} micro-batches"


def _print_json(data: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(data) + "\n")


if __name__ == "__main__":
    sys.exit(main())
