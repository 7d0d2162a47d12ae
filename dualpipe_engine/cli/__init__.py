"""The `dualpipe` command: one module a subcommand. Works without torch, `export` aside.

A subcommand reads its arguments, calls what does the work and prints; the work stands elsewhere.
"""

from .main import main

__all__ = ["main"]
