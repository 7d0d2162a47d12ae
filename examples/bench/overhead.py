"""What an engine itself costs: stages that compute next to nothing, so a step is transfers and bookkeeping.

python examples/bench/overhead.py                        # 4 ranks, 64 micro-batches, [2, 8] floats
python examples/bench/overhead.py --explain --only zb1p  # where the step goes, by part of the engine and kind of op
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ranks import run_ranks
from schedules import AUTO, PAIRED, STOCK, chosen, leave_groups, rows
from sleeping import Times


def explained(rank: int, micros: int, steps: int, contestants: list[str]) -> list[dict[str, Any]]:
    """Where the steps of each contestant go, the mean of the ranks; runs on every rank."""
    from contestants import Job, started
    from explain import look_at

    found = []
    for name in contestants:
        if name in PAIRED and (micros % 2 or micros < 2 * dist.get_world_size()):
            continue
        pipeline = started(name, Job(dist.get_world_size(), micros, Times(0.0, 0.0, 0.0)))
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, look_at(pipeline.step, steps, pipeline.position))
        seconds: Counter[tuple[str, str]] = Counter()
        for each in ranks:
            for part, kind, spent in each["parts"]:
                seconds[part, kind] += spent / len(ranks)
        parts = [[part, kind, spent] for (part, kind), spent in seconds.most_common()]
        found.append({"name": name, "step": sum(each["step"] for each in ranks) / len(ranks), "parts": parts})
        del pipeline
        gc.collect()
        leave_groups()
    return found


def explain(found: list[dict[str, Any]], out: Path | None) -> None:
    from explain import table
    from rich.console import Console

    for row in found:
        Console(width=150).print(table(row))
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="pipeline ranks, one process each (default 4)")
    parser.add_argument("--micro-batches", type=int, default=64, help="micro-batches of a step (default 64)")
    parser.add_argument("--steps", type=int, default=15, help="measured steps; the median counts (default 15)")
    parser.add_argument("--only", default="", help="comma-separated words; contestants whose name has one of them")
    parser.add_argument("--explain", action="store_true", help="where the step goes, in place of its time alone")
    parser.add_argument("--out", type=Path, help="with --explain: write its numbers (seconds) into this JSON file")
    args = parser.parse_args()
    if args.out and not args.explain:
        parser.error("--out writes what --explain finds")
    try:
        contestants = [name for name in chosen(args.only) if not name.endswith(AUTO)]
    except ValueError as error:
        parser.error(str(error))
    if args.explain:
        explain(run_ranks(explained, args.ranks, args.micro_batches, args.steps, contestants), args.out)
        return 0
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
