"""`dualpipe export`: the weights of a checkpoint for use elsewhere."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from .arguments import Commands

_DESCRIPTION = """\
Write the weights of a checkpoint as one state dict, OUT/model.safetensors. For a model of Hugging Face transformers
that came through an adapter, and for DeepSeek-V3 of dualpipe_engine.models, config.json is put beside it, so that
from_pretrained(OUT) loads it. Needs torch and safetensors.
"""


def add_export(commands: Commands, shape: dict[str, Any]) -> None:
    """Add the subcommand to `commands`, with the parser settings `shape`."""
    about = "the weights of a checkpoint as one safetensors file or Hugging Face folder"
    parser = commands.add_parser("export", help=about, description=_DESCRIPTION, **shape)
    which = "folder given to save_checkpoint (its latest checkpoint), or one checkpoint in it"
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", required=True, help=which)
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder to write, made if missing")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    with redirect_stdout(sys.stderr):  # where what DeepSpeed logs goes then
        from ..engine.checkpoint.export import export

        paths = export(args.checkpoint, args.out)
    for path in paths:
        print(path)
