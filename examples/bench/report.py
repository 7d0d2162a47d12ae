"""All benchmarks in one run, a table a question: step time, overhead, scaling, planning and memory.

Stages sleep as in schedules.py, so the ranks of one machine show what a schedule and an engine cost; those of a GPT
compute, as in computing.py.

    python examples/bench/report.py --quick               # fewer ranks, micro-batches and sizes
    python examples/bench/report.py --out report/         # also writes report/report.json and report/report.png
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from computing import NAMES, Sizes, run
from memory import DEEPSPEED, measure
from planner import OPTIMIZED, SIZES, plan_row
from ranks import run_ranks
from schedules import AUTO, DEEPSEEK, STOCK, names, rows
from sleeping import Times

Row = dict[str, Any]
SCALED = [STOCK, "stock dualpipev", "ours dualpipe", "ours dualpipev"]


@dataclass
class Section:
    """The rows that answer a question; `value` is the key that is drawn, `labels` the keys that name a bar."""

    title: str
    labels: list[str]
    value: str
    rows: list[Row] = field(default_factory=list)


def ms(seconds: float) -> Times:
    """Stages whose forward, input and weight gradient each take `seconds`."""
    return Times(seconds, seconds, seconds)


def beside_stock(found: Iterable[Row], ranks: int) -> list[Row]:
    """Rows of `schedules.rows` with the ranks and how many times faster than DeepSpeed's 1F1B each step is."""
    found = list(found)
    base = {row["micro_batches"]: row["seconds"] for row in found if row["name"] == STOCK}
    return [
        {
            "pipeline": row["name"],
            "ranks": ranks,
            "micro_batches": row["micro_batches"],
            "step_ms": row["seconds"] * 1e3,
            "simulated_ms": row["simulated"] * 1e3 if row["simulated"] else None,
            "speedup": base[row["micro_batches"]] / row["seconds"],
        }
        for row in found
    ]


def absent() -> list[Row]:
    """A row that says that DeepSeek's `dualpipe` is not measured, where it is not installed."""
    missing = importlib.util.find_spec("dualpipe") is None
    return [{"pipeline": f"{DEEPSEEK}: not installed"}] if missing else []


def step_time(args: argparse.Namespace) -> Section:
    ranks, micros = (4, [8]) if args.quick else (8, [16, 32])
    found = run_ranks(rows, ranks, ms(0.01 if args.quick else 0.02), micros, args.steps, names())
    title = "Step time on stages that sleep"
    return Section(title, ["pipeline", "micro_batches"], "step_ms", [*beside_stock(found, ranks), *absent()])


def computing(args: argparse.Namespace) -> Section:
    found = run(2, Sizes(hidden=64 if args.quick else 256), [4] if args.quick else [4, 16], args.steps, NAMES)
    title = "Step time of a GPT"
    return Section(title, ["pipeline", "micro_batches"], "step_ms", beside_stock(found, 2))


def overhead(args: argparse.Namespace) -> Section:
    contestants = [name for name in names() if not name.endswith(AUTO)]
    found = run_ranks(rows, 4, ms(0.0), [16 if args.quick else 64], 3 * args.steps, contestants)
    found = [{**row, "simulated": None} for row in found]
    return Section("Overhead: no computation", ["pipeline"], "step_ms", beside_stock(found, 4))


def scaling_micro_batches(args: argparse.Namespace) -> Section:
    micros = [8, 16] if args.quick else [8, 16, 32, 64]
    found = run_ranks(rows, 4, ms(0.005), micros, args.steps, SCALED)
    title = "Scaling with micro-batches"
    return Section(title, ["pipeline", "micro_batches"], "step_ms", beside_stock(found, 4))


def scaling_ranks(args: argparse.Namespace) -> Section:
    out = Section("Scaling with ranks", ["pipeline", "ranks"], "step_ms")
    for ranks in (2, 4) if args.quick else (2, 4, 8):
        found = run_ranks(rows, ranks, ms(0.005), [16], args.steps, SCALED)
        out.rows += beside_stock(found, ranks)
    return out


def planner(args: argparse.Namespace) -> Section:
    out = Section("Planner", ["schedule", "order", "ranks", "micro_batches"], "seconds")
    for ranks, micros in SIZES[:2] if args.quick else SIZES:
        for optimize in (False, True) if ranks * micros <= OPTIMIZED else (False,):
            out.rows.append(plan_row("dualpipe", ranks, micros, optimize))
    return out


def memory(args: argparse.Namespace) -> Section:
    ours = ("dualpipe", "dualpipev")
    cases = [(schedule, "fp32", 0) for schedule in (*DEEPSPEED, *ours)]
    if not args.quick:
        cases += [(schedule, "bf16", 1) for schedule in (*DEEPSPEED, *ours)]
        cases += [(schedule, "bf16", 2) for schedule in ours]
    out = Section("Memory of the fullest rank (bytes)", ["schedule", "precision", "zero"], "total")
    for case, sizes in zip(cases, run_ranks(measure, 4, cases), strict=True):
        sized = dict(zip(("weights", "gradients", "optimizer"), sizes, strict=True))
        out.rows.append({**dict(zip(out.labels, case, strict=True)), **sized, "total": sum(sizes)})
    return out


QUESTIONS = {
    "step": step_time,
    "computing": computing,
    "overhead": overhead,
    "micro-batches": scaling_micro_batches,
    "ranks": scaling_ranks,
    "planner": planner,
    "memory": memory,
}


def text(value: Any) -> str:
    """A cell: four digits of a small number, whole large ones."""
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,.4g}" if isinstance(value, float) and value < 1e4 else f"{value:,.0f}"


def table(section: Section) -> Any:
    """The section as a rich table; a key that a row lacks is shown as "-"."""
    from rich.table import Table

    out = Table(title=section.title, title_justify="left")
    keys = list(dict.fromkeys(key for row in section.rows for key in row))
    for key in keys:
        out.add_column(key.replace("_", " "), justify="left" if isinstance(section.rows[0].get(key), str) else "right")
    for row in section.rows:
        out.add_row(*(text(row.get(key)) for key in keys))
    return out


def _label(key: str, value: Any) -> str:
    return value if isinstance(value, str) else f"{value} {key.replace('_', '-')}"


def write(sections: list[Section], folder: Path) -> None:
    """Write report.json and report.png into `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps([asdict(section) for section in sections], indent=1))
    heights = [max(3, len(section.rows)) for section in sections]
    figure, axes = plt.subplots(
        len(sections), 1, figsize=(9, 0.3 * sum(heights) + len(sections)), height_ratios=heights, squeeze=False
    )
    for axis, section in zip(axes[:, 0], sections, strict=True):
        drawn = [row for row in section.rows if row.get(section.value) is not None]
        names = [", ".join(_label(key, row[key]) for key in section.labels) for row in drawn]
        axis.barh(names, [row[section.value] for row in drawn], color="#4878b0")
        axis.set(title=section.title, xlabel=section.value.replace("_", " "))
        axis.tick_params(labelsize=7)
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(folder / "report.png")
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer ranks, micro-batches and sizes")
    parser.add_argument("--only", default=",".join(QUESTIONS), help="comma-separated questions (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="measured steps; the median counts (default 3)")
    parser.add_argument("--out", type=Path, help="folder for report.json and report.png")
    args = parser.parse_args()
    chosen = [name.strip() for name in args.only.split(",")]
    if unknown := [name for name in chosen if name not in QUESTIONS]:
        parser.error(f"unknown questions {', '.join(unknown)}: there are {', '.join(QUESTIONS)}")
    from rich.console import Console
    from rich.progress import Progress

    console, sections = Console(width=120), []
    with Progress(console=console, transient=True) as progress:
        for name in progress.track(chosen, description="questions"):
            sections.append(QUESTIONS[name](args))
            console.print(table(sections[-1]))
    if args.out:
        write(sections, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
