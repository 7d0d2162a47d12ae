"""The parser of all subcommands, and what becomes of errors."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from .. import __version__
from ..errors import DualPipeError
from ..schedule.gc_paused import collector_paused
from .compare import add_compare
from .convert import add_convert
from .doctor import add_doctor
from .draw import add_draw
from .export import add_export
from .memory import add_memory
from .plan import add_plan
from .report import add_report

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
  dualpipe report runs/dualpipe --out report.html
  dualpipe compare --ranks 8 --micro-batches 32 --costs 1,1,1,2.25 --optimize
  dualpipe compare --ranks 8 --micro-batches 32 --layer-costs 0.2,1x40,3
  dualpipe compare --model deepseek-v3 --gpus 2048 --hardware h800
  dualpipe export --checkpoint runs/gpt --out exported
  dualpipe convert --checkpoint runs/gpt/global_step100 --out runs/gpt/global_step100_universal
  dualpipe memory --config ds.json --ranks 8 --params-per-stage 8.75e8 --activation-bytes 6e8

exit codes: 0 done; 1 nobody reads the output (a closed pipe); 2 the request cannot work (the reason is on stderr)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    _open_missing_streams()
    args = _parser().parse_args(argv)
    try:
        with collector_paused():
            args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return 1
    except (DualPipeError, OSError) as error:
        if isinstance(error, OSError):  # a full disk
            _drop_output()
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _open_missing_streams() -> None:
    """What the caller has closed is /dev/null, which takes its number: else that of a file opened later would."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, closefd=False))


def _drop_output() -> None:
    """What is not written yet goes nowhere, so that the interpreter's last flush is quiet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    shape: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": _EPILOG}
    parser = argparse.ArgumentParser(prog="dualpipe", description=_DESCRIPTION, **shape)
    parser.add_argument("--version", action="version", version=f"dualpipe_engine {__version__}")
    commands = parser.add_subparsers(metavar="plan|draw|compare|memory|doctor|report|export|convert", required=True)
    for add in (add_plan, add_draw, add_compare, add_memory, add_doctor, add_report, add_export, add_convert):
        add(commands, shape)
    return parser
