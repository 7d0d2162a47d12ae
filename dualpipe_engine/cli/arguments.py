"""Arguments that subcommands share, and what they stand for."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeAlias

from ..errors import ConfigError
from ..schedule.cuts.layer_times import parse_layer_costs
from ..schedule.orders.interleaved import STAGES
from ..schedule.orders.registry import KNOWN, SCHEDULES, known_schedule, placement_of
from ..schedule.passes.offload import offload
from ..schedule.passes.verify import verify
from ..schedule.plan import Plan
from ..schedule.search.job_costs import Measurement
from ..schedule.search.make_plan import make_plan
from ..schedule.timing.costs import MOST, CostModel

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What subcommands are added to."""

_FILES = (".csv", ".json")

_COSTS_HELP = (
    "time of a forward, of the input part and of the weight part of a backward, and of an overlapped F&B pair, on 1/N "
    "of the model (rank count N; schedules with more stages a rank run it in parts). Any unit: all times shown are in "
    "that unit. Without FB, pairs take F+I+W: no overlap (default: 1,1,1,3). Or the file that "
    '"schedule": "auto" measured'
)


def add_schedule(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Which plan: the schedule or the file, and the work. Returns what was added, but for the schedule."""
    parser.add_argument("--schedule", metavar="S", help=f"{', '.join(SCHEDULES)}, or a plan file (.csv, .json)")
    work = add_work(parser, plan_file=True)
    cap = (
        "(stage, micro-batch) activations that a rank may hold (default: what the schedule is known for); zbv, vhalf "
        "and vmin keep any from 2"
    )
    tries = (
        "small changes that --optimize tries on each of the fastest orders where transfers take time (default: 4000; "
        "100000 take half a minute for 8 ranks and 16 micro-batches, and shorten some plans by up to 3 %%)"
    )
    fewer = (
        "activations by which the peak of every rank shall fall, because those that live longest are in host memory "
        "between forward and backward; all: as many as can be"
    )
    copy = (
        "time of the copy of what 1/N of the model keeps of a micro-batch to host memory, and of that back (default: 0)"
    )
    return [
        *work,
        parser.add_argument("--activation-cap", type=whole, metavar="K", help=cap),
        add_stages(parser),
        parser.add_argument("--tries", type=whole, metavar="N", help=tries),
        parser.add_argument(
            "--offload-activations", type=fewer_activations, metavar="N|all", default=False, help=fewer
        ),
        parser.add_argument("--copy", type=finite, metavar="C", help=copy),
    ]


def add_stages(parser: argparse.ArgumentParser) -> argparse.Action:
    """Stages a rank, of the schedules that take any number."""
    names = " and ".join(name for name, each in KNOWN.items() if each.with_stages is not None)
    stages = f"stages that a rank holds under {names} (default: {STAGES}); the others have a fixed number"
    return parser.add_argument("--stages-per-rank", type=whole, metavar="V", help=stages)


def add_length(parser: argparse._ActionsContainer, text: str) -> argparse.Action:
    """Tokens of a sequence; `text` is the help."""
    return parser.add_argument("--sequence-length", "--length", type=whole, metavar="N", help=text)


def add_work(parser: argparse.ArgumentParser, plan_file: bool) -> list[argparse.Action]:
    """Ranks, micro-batches and costs; `plan_file`: a plan file may have the first two. Returns what was added."""
    where = " (a plan file has its own)" if plan_file else ""
    measured = where or " (measured --costs have their own)"
    unit = CostModel(fb=3.0)
    comm = "time of one transfer between two ranks, in the unit of --costs (default: 0, or the measured one)"
    best = "search for the order with the smallest makespan under the costs, instead of the reference order"
    return [
        parser.add_argument("--ranks", type=whole, metavar="N", help=f"pipeline ranks{measured}"),
        parser.add_argument(
            "--micro-batches", type=whole, metavar="M", help=f"micro-batches of one pipeline in a batch{where}"
        ),
        parser.add_argument("--costs", type=costs_argument, default=unit, metavar="F,I,W[,FB]", help=_COSTS_HELP),
        parser.add_argument("--comm", type=finite, metavar="C", help=comm),
        parser.add_argument("--optimize", action="store_true", help=best),
    ]


def finite(text: str) -> float:
    """A number that can be reckoned with: not negative, infinite or NaN, not above `MOST`."""
    with suppress(ValueError):
        if 0 <= (number := float(text)) <= MOST:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to {MOST:g}")


def fewer_activations(text: str) -> bool | int:
    """The value of --offload-activations: a whole number, or all."""
    return True if text == "all" else whole(text)


def whole(text: str) -> int:
    """A count of something: a whole number above 0, of up to nine digits."""
    with suppress(ValueError):
        if 1 <= (number := int(text)) < 10**9:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 999,999,999")


def costs_argument(text: str) -> CostModel | Measurement:
    """The value of --costs."""
    if text.endswith(".json"):
        try:
            return Measurement.load(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    try:
        f, i, w, *pair = map(finite, text.split(","))
        (fb,) = pair or (f + i + w,)
        return CostModel(f, i, w, fb)
    except (ValueError, argparse.ArgumentTypeError):
        message = f"{text!r} is not F,I,W or F,I,W,FB: 3 or 4 numbers, such as 1,1,1,2.25, none negative"
        raise argparse.ArgumentTypeError(message) from None


def layer_costs(text: str) -> list[float]:
    """The value of --layer-costs."""
    try:
        return parse_layer_costs(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def refuse(args: argparse.Namespace, options: Iterable[argparse.Action], where: str) -> None:
    """Refuse those of `options` that were given.

    Raises:
        ConfigError: there are some; `where` tells with what they have no effect.
    """
    given = [option.option_strings[0] for option in options if getattr(args, option.dest) is not option.default]
    if given:
        raise ConfigError(f"{', '.join(given)}: no effect {where}, leave {'them' if given[1:] else 'it'} out")


def work(args: argparse.Namespace) -> tuple[CostModel, Measurement | None]:
    """The costs that the arguments name, with the measurement that they come from; fills in its number of ranks."""
    job = args.costs if isinstance(args.costs, Measurement) else None
    costs = job.costs if job else args.costs
    if job and args.ranks is None:
        args.ranks = job.ranks
    return (costs if args.comm is None else replace(costs, comm=args.comm)), job


def make(args: argparse.Namespace) -> tuple[Plan, CostModel]:
    """The verified plan that the arguments ask for, and the costs of its stages."""
    from ..viz.terminal import spinning

    costs, _ = work(args)
    if args.schedule is None:
        raise ConfigError(f"say which schedule: --schedule with {', '.join(SCHEDULES)} or a plan file")
    finished = Plan.load(args.schedule) if args.schedule.endswith(_FILES) else None
    if args.copy is not None:
        if not (args.offload_activations or (finished and finished.has_copies())):
            raise ConfigError("--copy is for --offload-activations: add it, or leave --copy out")
        costs = replace(costs, copy=args.copy)
    if finished:
        plan = finished
        for option, asked, found in (
            ("--ranks", args.ranks, plan.placement.num_ranks),
            ("--micro-batches", args.micro_batches, plan.num_micro),
        ):
            if asked not in (None, found):
                raise ConfigError(f"{args.schedule} is a plan with {option} {found}, not {asked}: leave {option} out")
        for option, given in (
            ("--optimize", args.optimize),
            ("--stages-per-rank", args.stages_per_rank is not None),
            ("--tries", args.tries is not None),
        ):
            if given:
                raise ConfigError(f"{args.schedule} is a finished plan: leave {option} out")
        costs = costs.for_placement(plan.placement)
    else:
        stages = args.stages_per_rank
        known_schedule(args.schedule, stages)
        if args.ranks is None or args.micro_batches is None:
            raise ConfigError(f"schedule {args.schedule!r} needs --ranks N and --micro-batches M")
        costs = costs.for_placement(placement_of(args.schedule, args.ranks, stages))
        shape = args.ranks, args.micro_batches
        searched = {"activation_cap": args.activation_cap, "stages_per_rank": stages, "tries": args.tries}
        with spinning(f"looking for {'the fastest order of ' if args.optimize else ''}{args.schedule}"):
            plan = make_plan(args.schedule, *shape, costs, args.optimize, **searched)
    plan = offload(plan.unlowered() if args.offload_activations else plan, args.offload_activations, costs, exact=True)
    verify(plan, activation_cap=args.activation_cap)
    return plan, costs


def title_of(plan: Plan) -> str:
    """What stands above a table or a drawing."""
    return f"{plan.schedule}, {plan.placement.num_ranks} ranks, {plan.num_micro} micro-batches"


def print_json(data: dict[str, Any]) -> None:
    """One line on stdout."""
    sys.stdout.write(json.dumps(data) + "\n")
