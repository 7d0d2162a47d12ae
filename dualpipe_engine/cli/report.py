"""`dualpipe report`: a page to look at, of one run."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import Commands


def add_report(commands: Commands, shape: dict[str, Any]) -> None:
    """Add the subcommand to `commands`, with the parser settings `shape`."""
    parser = commands.add_parser("report", help="write a page (HTML) that shows a run and its schedule", **shape)
    parser.add_argument(
        "source", metavar="RUN", help="folder of a run with its dualpipe_profile.json, or such a file alone"
    )
    parser.add_argument("--out", metavar="FILE", default="report.html", help="the page (default: report.html)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from ..page.html import save_page
    from ..page.run import read_run

    save_page(args.out, read_run(args.source))
