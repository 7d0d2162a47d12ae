"""`dualpipe draw`: a schedule over time, simulated or measured."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..schedule.plain_json import parse, read_text
from ..schedule.timing.simulate import simulate
from .arguments import Commands, add_schedule, make, refuse, title_of


def add_draw(commands: Commands, shape: dict[str, Any]) -> None:
    """Add the subcommand to `commands`, with the parser settings `shape`."""
    parser = commands.add_parser("draw", help="draw a schedule over time: terminal, SVG or PNG", **shape)
    parser.add_argument("file", nargs="?", help="a trace (Chrome JSON) of a measured batch, or a plan file")
    simulated = add_schedule(parser)
    parser.add_argument("--out", metavar="FILE", help="write FILE, .svg or .png; without it: draw in the terminal")
    parser.set_defaults(run=partial(_run, simulated))


def _run(simulated: list[argparse.Action], args: argparse.Namespace) -> None:
    from ..viz.chrome import read_chrome
    from ..viz.figure import save_figure
    from ..viz.terminal import draw_terminal, wide_console

    if args.file is not None and args.schedule is not None:
        raise ConfigError(f"draw either {args.file} or --schedule {args.schedule}, not both")
    if args.file is not None and _is_trace(args.file):
        refuse(args, simulated, f"on {args.file}, which was measured")
        timeline, title, unit = read_chrome(args.file), Path(args.file).name, "s"
    else:
        args.schedule = args.schedule if args.file is None else args.file
        plan, costs = make(args)
        timeline, title, unit = simulate(plan, costs), title_of(plan), ""
    if args.out is not None:
        save_figure(args.out, timeline, title, unit)
    else:
        draw_terminal(timeline, wide_console(), title, unit)


def _is_trace(path: str) -> bool:
    """Whether a .json file is no plan; what cannot be read is left to `Plan.load`, which says why."""
    if not path.endswith(".json"):
        return False
    try:
        data = parse(read_text(path))
    except (OSError, ValueError):
        return False
    return not (isinstance(data, dict) and "programs" in data)
