"""`dualpipe plan`: the ops of every rank."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..schedule.passes.lower import lower
from ..schedule.passes.verify import verify
from ..schedule.plan import placement_data
from ..schedule.timing.bound import plan_bound
from ..schedule.timing.simulate import peak_activations, simulate
from .arguments import Commands, add_schedule, make, print_json, title_of


def add_plan(commands: Commands, shape: dict[str, Any]) -> None:
    """Add the subcommand to `commands`, with the parser settings `shape`."""
    parser = commands.add_parser("plan", help="print the ops of every rank, with makespan and bubble", **shape)
    add_schedule(parser)
    parser.add_argument("--format", choices=("table", "json", "csv"), default="table", help="default: table")
    comm = "show sends, receives, gradient reduction and step too"
    parser.add_argument("--with-comm", action="store_true", help=comm)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    plan, costs = make(args)
    shown = plan
    if not args.with_comm:
        shown = plan.unlowered()
    elif not plan.has_comm():
        shown = lower(plan.unlowered())
        verify(shown, activation_cap=args.activation_cap)
    if args.format == "csv":
        sys.stdout.write(shown.to_csv())
        return
    timeline, peaks, bound = simulate(plan, costs), peak_activations(plan), plan_bound(plan, costs)
    if args.format == "json":
        print_json(
            {
                "schedule": plan.schedule,
                **placement_data(plan.placement),
                "micro_batches": plan.num_micro,
                "makespan": timeline.makespan,
                "bubble": timeline.bubble(),
                "peak_activations": peaks,
                "lower_bound": bound,
                "programs": shown.texts(),
            }
        )
        return
    from ..viz.cells import headline
    from ..viz.summary import plan_table
    from ..viz.terminal import wide_console

    console = wide_console()
    console.print(plan_table(shown))
    facts = f"lower bound {bound:.4g}, at most {max(peaks)} activations alive on a rank; verified"
    console.print(f"{title_of(plan)}: {headline(timeline)}, {facts}", highlight=False, markup=False)
