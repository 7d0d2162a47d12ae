"""Schedules on a GPT that computes: this engine's beside DeepSpeed's 1F1B and DualPipeV ("stock").

All contestants live side by side in the same processes and take their steps in turns, so what disturbs the machine
disturbs all of them. Each rank keeps to a core of its own where there are enough. Beside the step stand the makespan
that the plan has with the times that its ops took in that step, what a forward and a backward of a micro-batch take on
all stages together (a split backward is I + W), and the tail: what the step takes behind the last op of the last rank.
Each is the median of the steps. Memory that is freed stays with the processes, as an accelerator's allocator keeps it:
glibc would give it back behind every W, which makes I and W slower than B (docs/profile.md).

    python examples/bench/computing.py                          # 8 blocks on 2 ranks, M = 4 and 16
    python examples/bench/computing.py --zero 2 --only zb1p,dualpipe
    python examples/bench/computing.py --ranks 4 --out gpt.json # writes gpt.json and gpt.png
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from cores import cores_of, pin
from deepspeed.pipe import LayerSpec
from output import write
from ranks import run_ranks
from schedules import OURS, PAIRED, STOCK, chosen, once, plot

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

LENGTH, HEADS, ROWS = 128, 4, 4  #: of a sequence, of a block, of a micro-batch
NAMES = (STOCK, PAIRED[1], *(f"ours {name}" for name in OURS))
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}  #: glibc's variables
TIMES = ("seconds", "simulated", "forward", "backward", "tail")


class Sizes(NamedTuple):
    """Of the model and the engines.

    Args:
        blocks: of the GPT.
        hidden: width.
        zero: stage of ZeRO.
    """

    blocks: int = 8
    hidden: int = 256
    zero: int = 1


class Seeded(LayerSpec):
    """A layer whose weights depend on its number, not on what was built before it."""

    def __init__(self, number: int, kind: type[torch.nn.Module], *args: Any) -> None:
        super().__init__(kind, *args)
        self._number = number

    def build(self, log: bool = False) -> torch.nn.Module:
        torch.manual_seed(self._number)
        layer: torch.nn.Module = super().build(log)
        return layer


class Contestant:
    """An engine on the GPT.

    Args:
        name: one of `NAMES`.
        micros: micro-batches of a step.
        sizes: of the model.

    Attributes:
        rows: of each step the seconds that `TIMES` names.
        losses: of the steps.
    """

    def __init__(self, name: str, micros: int, sizes: Sizes) -> None:
        self.name, self.micros = name, micros
        self.rows: list[dict[str, float | None]] = []
        self.losses: list[float] = []
        self._engine = _engine(name, micros, sizes)
        self._data = _data()

    def step(self) -> None:
        """Take a step and keep what it took; on all ranks."""
        begin, seconds = once(lambda: self.losses.append(float(self._engine.train_batch(self._data))))
        row: dict[str, float | None] = {"seconds": seconds}
        if self.name.startswith("ours"):
            from dualpipe_engine.schedule.op import COMPUTE, F

            measured = self._engine.timeline()
            spans = [span for span in measured.spans if span.op.kind in COMPUTE]
            forward = sum(span.end - span.start for span in spans if span.op.kind == F)
            row["simulated"] = self._engine.simulated(measured).makespan
            row["forward"] = forward / self.micros
            row["backward"] = (sum(span.end - span.start for span in spans) - forward) / self.micros
            row["tail"] = begin + seconds - max(span.end for span in spans)
        self.rows.append(row)

    def medians(self) -> dict[str, Any]:
        """Name, micro-batches, and the median of each of `TIMES` but for the first step, which warms up."""
        times = {key: [row[key] for row in self.rows[1:]] for key in TIMES if key in self.rows[0]}
        found = {key: median(each) for key, each in times.items()}
        return {"name": self.name, "micro_batches": self.micros, **dict.fromkeys(TIMES), **found}


def _engine(name: str, micros: int, sizes: Sizes) -> Any:
    import deepspeed
    import gpt
    from deepspeed.pipe import DualPipeVModule, PipelineModule

    import dualpipe_engine

    who, _, schedule = name.partition(" ")
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": micros,
        "steps_per_print": None,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": sizes.zero},
    }
    if who == "ours":
        config["pipeline"] = {"schedule": schedule, "overlap": False}
    kind = DualPipeVModule if name == PAIRED[1] else PipelineModule
    initialize = dualpipe_engine.initialize if who == "ours" else deepspeed.initialize
    kinds = [
        (gpt.Embedding, sizes.hidden, LENGTH),
        *[(gpt.Block, sizes.hidden, HEADS)] * sizes.blocks,
        (torch.nn.Linear, sizes.hidden, gpt.VOCABULARY),
    ]
    layers = [Seeded(number, *each) for number, each in enumerate(kinds)]
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints layers and topologies
        module = kind(layers, num_stages=dist.get_world_size(), loss_fn=gpt.loss, partition_method="type:Block")
        engine, *_ = initialize(model=module, config=config)
    return engine


def _data() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    from gpt import VOCABULARY

    generator = torch.Generator().manual_seed(2)
    while True:
        tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
        yield tokens, tokens


def measure(rank: int, sizes: Sizes, micros: list[int], steps: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of all contestants; runs on every rank.

    Raises:
        RuntimeError: two contestants do not train alike.
    """
    from rich.progress import Progress

    pin(rank, dist.get_world_size())
    found = []
    with Progress(disable=rank != 0 or not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("measuring", total=len(micros) * (steps + 1))
        for count in micros:
            contestants = [Contestant(name, count, sizes) for name in names]
            for _ in range(steps + 1):
                for contestant in contestants:
                    contestant.step()
                progress.advance(task)
            for contestant in contestants:
                torch.testing.assert_close(contestant.losses, contestants[0].losses, rtol=1e-5, atol=0.0)
            found += [contestant.medians() for contestant in contestants]
    return found


def run(ranks: int, sizes: Sizes, micros: list[int], steps: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """`measure` on new processes, whose allocator reads its variables when they start."""
    with patch.dict(os.environ, KEEP_MEMORY):
        found: list[dict[str, Any]] = run_ranks(measure, ranks, sizes, micros, steps, names)
    return found


def table(found: list[dict[str, Any]], title: str) -> Any:
    """Adds "speedup", the step of DeepSpeed's 1F1B over its own, to each row."""
    from rich.table import Table

    out = Table(title=title, title_justify="left")
    names = ("micro-batches", "pipeline", "step (ms)", "simulated", "measured / simulated", "stock 1f1b / its")
    for column in (*names, "forward", "backward", "tail"):
        left = column == "pipeline"
        out.add_column(column, justify="left" if left else "right", no_wrap=left)
    base = {row["micro_batches"]: row["seconds"] for row in found if row["name"] == STOCK}
    for row in found:
        seconds, simulated, stock = row["seconds"], row["simulated"], base.get(row["micro_batches"])
        row["speedup"] = stock and stock / seconds
        out.add_row(
            str(row["micro_batches"]),
            row["name"],
            _ms(seconds),
            _ms(simulated),
            f"{seconds / simulated:.3f}" if simulated else "-",
            f"{row['speedup']:.2f}x" if stock else "-",
            *(_ms(row[key]) for key in ("forward", "backward", "tail")),
        )
    return out


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="pipeline ranks, one process each (default 2)")
    parser.add_argument("--micro-batches", default="4,16", help="comma-separated counts (default 4,16)")
    parser.add_argument("--blocks", type=int, default=8, help="of the GPT, twice as many as ranks at least (default 8)")
    parser.add_argument("--hidden", type=int, default=256, help="width of the GPT (default 256)")
    parser.add_argument("--zero", type=int, choices=(0, 1, 2), default=1, help="stage of ZeRO (default 1)")
    parser.add_argument("--steps", type=int, default=9, help="measured steps, of which the median counts (default 9)")
    parser.add_argument("--only", default="", help="comma-separated words; contestants whose name has one of them")
    parser.add_argument("--out", type=Path, help="write FILE.json with the rows and FILE.png with bars")
    args = parser.parse_args()
    micros = [int(count) for count in args.micro_batches.split(",")]
    known = [name for name in NAMES if args.zero < 2 or name.startswith("ours")]  # DeepSpeed's take ZeRO-0 and 1 only
    try:
        names = chosen(args.only, known)
    except ValueError as error:
        parser.error(str(error))
    if args.blocks < 2 * args.ranks:
        parser.error(f"--blocks: at least {2 * args.ranks}, one for each stage")
    if any(count % 2 or count < 2 * args.ranks for count in micros):
        parser.error(f"--micro-batches: even and at least {2 * args.ranks}, which both ends of a pipeline share")
    sizes = Sizes(args.blocks, args.hidden, args.zero)
    found = run(args.ranks, sizes, micros, args.steps, names)
    title = (
        f"GPT of {args.blocks} blocks of {args.hidden}, {args.ranks} ranks, {cores_of(args.ranks)}, ZeRO-{args.zero}"
    )

    from rich.console import Console

    Console(width=130).print(table(found, title))
    write(args.out, title, found, plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
