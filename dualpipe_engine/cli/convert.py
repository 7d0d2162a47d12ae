"""`dualpipe convert`: a checkpoint whose optimizer state loads elsewhere."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from .arguments import Commands

_DESCRIPTION = """\
Join the optimizer state of a checkpoint parameter by parameter, experts that ranks share included: a Universal
Checkpoint of DeepSpeed, which loads under any schedule, number of ranks, expert-parallel size and ZeRO stage with
"checkpoint": {"load_universal": true} in the configuration. Needs torch.
"""


def add_convert(commands: Commands, shape: dict[str, Any]) -> None:
    """Add the subcommand to `commands`, with the parser settings `shape`."""
    about = "a checkpoint whose optimizer state loads under other schedules and ranks"
    parser = commands.add_parser("convert", help=about, description=_DESCRIPTION, **shape)
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", required=True, help="folder of one checkpoint (a tag)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder to write: another tag beside it")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    with redirect_stdout(sys.stderr):  # where what DeepSpeed logs goes then
        from ..engine.checkpoint.convert import convert

        convert(args.checkpoint, args.out)
    print(args.out)
