"""`dualpipe doctor`: what costs most in a profile, and what to change."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from .arguments import Commands, print_json


def add_doctor(commands: Commands, shape: dict[str, Any]) -> None:
    """Add the subcommand to `commands`, with the parser settings `shape`."""
    parser = commands.add_parser("doctor", help="say what costs most in a profile, and what to change", **shape)
    parser.add_argument("profile", help="what get_profiler().save_to_file() wrote")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="default: table")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from ..profiling.doctor import diagnose
    from ..profiling.profile import read_profile
    from ..profiling.report import print_findings, print_summary

    profile = read_profile(args.profile)
    findings = diagnose(profile)
    if args.format == "json":
        print_json({"step": profile.step, "findings": [asdict(finding) for finding in findings]})
        return
    print_summary(profile)
    print_findings(profile, findings)
