"""Schedules on stages that sleep: what an order of work costs, beside DeepSpeed's 1F1B and DualPipeV ("stock"), torch's
schedules, DeepSeek's DualPipe if it is installed, and each plan without an engine ("bare": the machine's share).

Every stage sleeps F in a forward, I and W in a backward; its tensors are real and travel over gloo between processes
on this machine. So two cores are enough for eight ranks, and the times show the schedule and the engine's overhead.

    python examples/bench/schedules.py                       # 8 ranks, F = I = W = 20 ms, M = 16 and 32, no overlap
    python examples/bench/schedules.py --fb 45               # pairs of a forward and a backward take 45 ms, not 60
    python examples/bench/schedules.py --only stock,dualpipe --out bench.json
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from output import write
from ranks import run_ranks
from sleeping import Times, lateness

STOCK, AUTO, DEEPSEEK = "stock 1f1b", "auto", "DeepSeek dualpipe"
PAIRED = (DEEPSEEK, "stock dualpipev")  #: they refuse fewer micro-batches than two a rank
SOON_S = 0.05  #: from the announcement of a step to its start
OURS = ("1f1b", "interleaved", "zb1p", "interleaved_zb", "dualpipe", "dualpipev", "zbv", "vhalf", "vmin")


def timed(step: Callable[[], Any], steps: int) -> float:
    """Median seconds of a step, from a moment that all ranks wait for to the end of the last rank, after one step that
    warms up. The monotonic clock is the same for all processes of this machine."""
    return median([once(step)[1] for _ in range(steps + 1)][1:])


def once(step: Callable[[], Any]) -> tuple[float, float]:
    """(moment in seconds of the monotonic clock, seconds) from which on and for how long all ranks run `step`."""
    begin = torch.tensor(time.monotonic() + SOON_S, dtype=torch.float64)
    dist.broadcast(begin, src=0)
    time.sleep(max(0.0, float(begin) - time.monotonic()))
    step()
    taken = torch.tensor(time.monotonic(), dtype=torch.float64) - begin
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(begin), float(taken)


def leave_groups() -> None:
    """Give up the process groups of a contestant: each has a thread that wakes up all the time."""
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def names() -> list[str]:
    """All contestants."""
    from contestants import HAS_DEEPSEEK, TORCH

    others = [STOCK, "stock dualpipev", *([DEEPSEEK] if HAS_DEEPSEEK else []), *(f"torch {name}" for name in TORCH)]
    return [*others, *(f"{who} {name}" for name in OURS for who in ("bare", "ours")), f"ours {AUTO}"]


def chosen(words: str, known: Sequence[str] | None = None) -> list[str]:
    """The contestants (`names`, or those given as `known`) whose name has one of the comma-separated words; without a
    word all.

    Raises:
        ValueError: a word is in no name.
    """
    only = [word.strip() for word in words.split(",") if word.strip()]
    known = names() if known is None else known
    if unknown := [word for word in only if not any(word in name for name in known)]:
        raise ValueError(f"--only: no name has {', '.join(unknown)}; there are {', '.join(known)}")
    return [name for name in known if not only or any(word in name for word in only)]


def rows(rank: int, times: Times, micros: list[int], steps: int, contestants: list[str]) -> list[dict[str, Any]]:
    """Measure on one rank; all ranks measure the same."""
    from contestants import Job, started
    from rich.progress import Progress

    found: list[dict[str, Any]] = []
    if longest := max(times.f, times.i, times.w):
        times.late = lateness(longest)
    with Progress(disable=rank != 0, transient=True) as progress:
        task = progress.add_task("measuring", total=len(contestants) * len(micros))
        for count in micros:
            for name in contestants:
                if name in PAIRED and (count % 2 or count < 2 * dist.get_world_size()):
                    continue
                job = Job(dist.get_world_size(), count, times)
                progress.update(task, description=f"{name}, {count} micro-batches")
                pipeline = started(name, job)
                runs = f"{name} ({pipeline.runs})" if name.endswith(AUTO) else name
                seconds = timed(pipeline.step, steps)
                found.append(
                    {"name": runs, "micro_batches": count, "seconds": seconds, "simulated": pipeline.simulated}
                )
                del pipeline
                gc.collect()
                leave_groups()
                progress.advance(task)
    return found


def table(found: list[dict[str, Any]], title: str) -> Any:
    from rich.table import Table

    out = Table(title=title, title_justify="left")
    ratios = ("measured / simulated", "stock 1f1b / its")
    for column in ("micro-batches", "pipeline", "step (ms)", "simulated (ms)", *ratios):
        out.add_column(column, justify="left" if column == "pipeline" else "right")
    base = {row["micro_batches"]: row["seconds"] for row in found if row["name"] == STOCK}
    for row in found:
        seconds, simulated = row["seconds"], row["simulated"]
        row["speedup"] = base[row["micro_batches"]] / seconds if row["micro_batches"] in base else None
        out.add_row(
            str(row["micro_batches"]),
            row["name"],
            f"{seconds * 1e3:.1f}",
            f"{simulated * 1e3:.1f}" if simulated else "-",
            f"{seconds / simulated:.3f}" if simulated else "-",
            f"{row['speedup']:.2f}x" if row["speedup"] else "-",
        )
    return out


def plot(found: list[dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    labels = list(dict.fromkeys(row["name"] for row in found))
    counts = sorted({row["micro_batches"] for row in found})
    figure, axes = plt.subplots(1, len(counts), figsize=(6 * len(counts), 0.4 * len(labels) + 1.5), squeeze=False)
    for axis, count in zip(axes[0], counts, strict=True):
        mine = [row for row in found if row["micro_batches"] == count]
        axis.barh([row["name"] for row in mine], [row["seconds"] for row in mine], color="#4878b0", label="measured")
        marked = [row for row in mine if row["simulated"]]
        axis.plot([row["simulated"] for row in marked], [row["name"] for row in marked], "k|", ms=14, label="simulated")
        axis.set(title=f"{count} micro-batches", xlabel="seconds per step")
        axis.invert_yaxis()
        axis.legend(loc="lower right", fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8, help="pipeline ranks, one process each (default 8)")
    parser.add_argument("--micro-batches", default="16,32", help="comma-separated counts (default 16,32)")
    for option, what in (("f", "forward"), ("i", "input gradient"), ("w", "weight gradient")):
        parser.add_argument(f"--{option}", type=float, default=20.0, help=f"ms of a stage's {what} (default 20)")
    parser.add_argument("--fb", type=float, help="ms of an overlapped forward and backward (default: no overlap)")
    parser.add_argument("--steps", type=int, default=9, help="measured steps; the median counts (default 9)")
    parser.add_argument("--only", default="", help="comma-separated words; contestants whose name has one of them")
    parser.add_argument("--out", type=Path, help="write FILE.json with the rows and FILE.png with bars")
    args = parser.parse_args()
    times = Times(args.f / 1e3, args.i / 1e3, args.w / 1e3, None if args.fb is None else args.fb / 1e3)
    micros = [int(count) for count in args.micro_batches.split(",")]
    try:
        contestants = chosen(args.only)
    except ValueError as error:
        parser.error(str(error))
    found = run_ranks(rows, args.ranks, times, micros, args.steps, contestants)
    pair = "no overlap" if args.fb is None else f"F&B = {args.fb:g}"
    title = f"{args.ranks} ranks, F, I, W = {args.f:g}, {args.i:g}, {args.w:g} ms, {pair}"
    from rich.console import Console

    Console(width=110).print(table(found, title))
    write(args.out, title, found, plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
