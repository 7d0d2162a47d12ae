"""What an engine itself costs: stages that compute next to nothing, so a step is transfers and bookkeeping.

python examples/bench/overhead.py                        # 4 ranks, 64 micro-batches, [2, 8] floats
"""

from __future__ import annotations

import argparse
import sys

from ranks import run_ranks
from schedules import AUTO, STOCK, chosen, rows
from sleeping import Times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="pipeline ranks, one process each (default 4)")
    parser.add_argument("--micro-batches", type=int, default=64, help="micro-batches of a step (default 64)")
    parser.add_argument("--steps", type=int, default=15, help="measured steps; the median counts (default 15)")
    parser.add_argument("--only", default="", help="comma-separated words; contestants whose name has one of them")
    args = parser.parse_args()
    try:
        contestants = [name for name in chosen(args.only) if not name.endswith(AUTO)]
    except ValueError as error:
        parser.error(str(error))
    found = run_ranks(rows, args.ranks, Times(0.0, 0.0, 0.0), [args.micro_batches], args.steps, contestants)

    from rich.console import Console
    from rich.table import Table

    title = f"{args.ranks} ranks, {args.micro_batches} micro-batches, no computation"
    table = Table(title=title, title_justify="left")
    for column in ("pipeline", "step [ms]", "of stock 1f1b's"):
        table.add_column(column, justify="left" if column == "pipeline" else "right")
    base = next((row["seconds"] for row in found if row["name"] == STOCK), None)
    for row in found:
        share = f"{row['seconds'] / base:.2f}" if base else "-"
        table.add_row(row["name"], f"{row['seconds'] * 1e3:.1f}", share)
    Console(width=110).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
