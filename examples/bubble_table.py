"""Bubble, makespan and memory of the schedules: DeepSeek's formulas beside the simulator, as a Markdown table.

    python examples/bubble_table.py [--ranks 8] [--micro-batches 20]

Formulas: DeepSeek-V3 report (arXiv 2412.19437), table 2. The bubble is the largest idle time of any rank. DualPipe runs
as many micro-batches over both directions as the others over one; placements with several stages a rank cut the model
into as many times the stages. Interleaved 1F1B: arXiv 2104.04473, section 2.2.
"""

from __future__ import annotations

import argparse

from dualpipe_engine.schedule.orders.interleaved import STAGES
from dualpipe_engine.schedule.search.compare import compare
from dualpipe_engine.schedule.timing.costs import CostModel

SETTINGS = {
    "F = I = W = 1, no overlap (F&B = 3)": CostModel(),
    "F = I = W = 1, F&B = 2.25": CostModel(fb=2.25),
    "F = 1, I = 1.3, W = 0.7, no overlap": CostModel(i=1.3, w=0.7),
}

COLUMNS = (
    "schedule",
    "bubble, formula",
    "bubble, reference order",
    "time, reference order",
    "time, optimized",
    "activations",
    "parameters",
)


def formula(schedule: str, ranks: int, costs: CostModel) -> str:
    """The published bubble, or a dash."""
    f, i, w, fb = costs.at(0)
    b = i + w
    values = {
        "1f1b": (ranks - 1) * (f + b),
        "zb1p": (ranks - 1) * (f + b - 2 * w),
        "dualpipe": (ranks / 2 - 1) * (fb + b - 3 * w),
        "dualpipev": (ranks / 2 - 1) * (fb + b - 3 * w),
        "interleaved": (ranks - 1) * (f + b) / STAGES,
    }
    return f"{values[schedule]:.2f}" if schedule in values else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, default=20)
    args = parser.parse_args()
    for title, costs in SETTINGS.items():
        print(f"{title}, {args.ranks} ranks, {args.micro_batches} micro-batches:\n")
        print("| " + " | ".join(COLUMNS) + " |")
        print("|" + "---|" * len(COLUMNS))
        reference = compare(args.ranks, args.micro_batches, costs, optimize=False)
        optimized = {row.schedule: row for row in compare(args.ranks, args.micro_batches, costs, optimize=True)}
        for row in reference:
            bubble, best = formula(row.schedule, args.ranks, costs), optimized[row.schedule].makespan
            numbers = f"{bubble} | {row.bubble:.2f} | {row.makespan:.2f} | {best:.2f} | {row.peak_activations:g}"
            print(f"| {row.schedule} | {numbers} | {row.parameter_copies}x |")
        print()


if __name__ == "__main__":
    main()
