"""The memory ladder: peak bytes of activations and step time of one GPT under each rung.

A rung is a schedule, its stages a rank, with or without recomputation by name, with or without activations in host
memory. The bytes are those of the fullest rank: computed from what one micro-batch keeps on each stage and the plan,
beside the most that is held behind any op. Step times are medians, from a moment that all ranks wait for to the end of
the last one. Each rank keeps to a core of its own where there are enough. Losses of two steps have to be the same to
the last bit on all rungs of a schedule.

    python examples/bench/ladder.py                             # 4 processes on the CPU, one pipeline: five minutes
    python examples/bench/ladder.py --only 1f1b,zbv --steps 9
    python examples/bench/ladder.py --out ladder.json           # writes ladder.json and ladder.png
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from dualpipe_engine.schedule.timing.costs import CostModel

HIDDEN, LENGTH, VOCABULARY = 128, 128, 256
SCHEDULES = ("1f1b", "zb1p", "dualpipe", "dualpipev", "zbv", "vhalf", "vmin", "interleaved", "interleaved_zb")
STAGES = (2, 4)  #: a rank, under the schedules that take any number


class Rung(NamedTuple):
    """What of the "pipeline" section is tried.

    Args:
        schedule: its name.
        stages: a rank; None: the schedule has a fixed number.
        recompute: what the blocks list is computed again.
        offload: the value of "offload_activations".
    """

    schedule: str
    stages: int | None = None
    recompute: bool = False
    offload: bool | int = False

    @property
    def way(self) -> str:
        """How the schedule is made to hold less."""
        away = "" if self.offload is False else f"offload {_away(self.offload)}"
        return " + ".join(filter(None, ["recompute" if self.recompute else "", away])) or "-"

    @property
    def name(self) -> str:
        """The schedule with its stages a rank."""
        return self.schedule if self.stages is None else f"{self.schedule} x{self.stages}"


class Sizes(NamedTuple):
    """Of the pipeline and its model.

    Args:
        ranks: of the pipeline.
        layers: blocks.
        micros: micro-batches of a step.
        steps: timed.
    """

    ranks: int = 4
    layers: int = 16
    micros: int = 8
    steps: int = 3


class Block(torch.nn.Module):
    """A block of a GPT; `recomputed` is what DeepSeek-V3 computes again: norms and activation functions."""

    recomputed = ("norm", "activation")

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(HIDDEN), torch.nn.LayerNorm(HIDDEN)
        self.qkv = torch.nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = torch.nn.Linear(HIDDEN, HIDDEN)
        self.up = torch.nn.Linear(HIDDEN, 4 * HIDDEN)
        self.activation = torch.nn.GELU()
        self.down = torch.nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(self.activation(self.up(self.norm2(x))))


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def rungs(
    schedules: tuple[str, ...] = SCHEDULES,
    stages: tuple[int, ...] = STAGES,
    offloads: tuple[bool | int, ...] = (False, 1, True),
) -> list[Rung]:
    """All of them, those of a schedule behind each other, the plain one first."""
    return [
        Rung(name, count, again, away)
        for name in schedules
        for count in (stages if name.startswith("interleaved") else (None,))
        for again in (False, True)
        for away in offloads
    ]


def measure(rank: int, sizes: Sizes, cases: list[Rung]) -> list[dict[str, Any]]:
    """Of each rung the bytes computed and measured on the fullest rank, the seconds of a step, and the losses."""
    from rich.progress import Progress

    from dualpipe_engine.comm.from_all import from_all

    kept: dict[tuple[str, bool], CostModel] = {}
    rows = []
    with Progress(disable=rank != 0 or not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("measuring", total=len(cases))
        for rung in cases:
            progress.update(task, description=f"{rung.name}, {rung.way}")
            row = _measure(sizes, rung, kept)
            found = from_all((row["computed"], row["measured"]))
            row["computed"], row["measured"] = max(found, key=lambda each: each[1])
            rows.append(row)
            progress.advance(task)
    return rows


def measure_pinned(rank: int, sizes: Sizes, cases: list[Rung]) -> list[dict[str, Any]]:
    """`measure` on cores of its own."""
    from cores import pin

    pin(rank, sizes.ranks)
    return measure(rank, sizes, cases)


def _measure(sizes: Sizes, rung: Rung, kept: dict[tuple[str, bool], CostModel]) -> dict[str, Any]:
    from dualpipe_engine.comm.from_all import from_all
    from dualpipe_engine.runtime.held import added_bytes
    from dualpipe_engine.schedule.op import STEP
    from dualpipe_engine.schedule.timing.simulate import peak_bytes
    from dualpipe_engine.testing.held_activations import activation_watch

    engine = _engine(sizes, rung)
    generator = torch.Generator().manual_seed(2)
    data = [torch.randint(0, VOCABULARY, (1, LENGTH), generator=generator) for _ in range(sizes.micros)]
    batch = [(tokens, tokens) for tokens in data]
    losses = [float(engine.train_batch(iter(batch)))]
    with activation_watch(engine) as held:
        losses.append(float(engine.train_batch(iter(batch))))
    key = rung.name, rung.recompute
    if key not in kept:  # the first rung of these has nothing in host memory
        kept[key] = _costs(from_all(added_bytes(held)), engine.plan.placement.num_stages)
    computed = peak_bytes(engine.plan, kept[key])
    seconds = _seconds(lambda: engine.train_batch(iter(batch)), sizes.steps)
    rank = engine.place.rank
    engine.destroy()
    return {
        "computed": computed[rank],
        "measured": max(size for op, size in held if op.kind != STEP),
        "seconds": seconds,
        "losses": losses,
    }


def _seconds(step: Callable[[], Any], steps: int) -> float:
    """The median of some steps; 0 of none."""
    if not steps:
        return 0.0
    from schedules import timed

    return timed(step, steps)


def _engine(sizes: Sizes, rung: Rung) -> Any:
    from deepspeed.pipe import LayerSpec, PipelineModule

    import dualpipe_engine

    torch.manual_seed(1)
    specs = [LayerSpec(torch.nn.Embedding, VOCABULARY, HIDDEN), *[LayerSpec(Block) for _ in range(sizes.layers)]]
    section = {"schedule": rung.schedule, "recompute": rung.recompute, "offload_activations": rung.offload}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": sizes.micros,
        "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
        "steps_per_print": None,
        "pipeline": section | {"overlap": False, "stages_per_rank": rung.stages},
    }
    with redirect_stdout(io.StringIO()):  # DeepSpeed prints layers and topologies
        module = PipelineModule(
            [*specs, LayerSpec(torch.nn.Linear, HIDDEN, VOCABULARY)],
            num_stages=sizes.ranks,
            loss_fn=cross_entropy,
            partition_method="type:Block",
        )
        engine, *_ = dualpipe_engine.initialize(model=module, config=config)
    return engine


def _costs(of_ranks: list[dict[tuple[str, int], int]], stages: int) -> CostModel:
    """What one micro-batch keeps on each stage, from F to I and from I to W."""
    from dualpipe_engine.schedule.timing.costs import CostModel

    added = {key: size for found in of_ranks for key, size in found.items()}
    kept = [added["F", stage] for stage in range(stages)]
    pending = [size + added.get(("I", stage), 0) for stage, size in enumerate(kept)]
    return CostModel(activation_bytes=tuple(kept), pending_bytes=tuple(pending))


def table(found: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: a row for each schedule with recomputation or without, a column for each way to offload."""
    titles = list(dict.fromkeys(f"offload {_away(row['offload'])}" for row in found))
    lines = [f"| schedule | recompute | {' | '.join(titles)} |", "|---|---|" + "---|" * len(titles)]
    for schedule, again in dict.fromkeys((row["schedule"], row["recompute"]) for row in found):
        mine = [row for row in found if (row["schedule"], row["recompute"]) == (schedule, again)]
        lines.append(f"| {schedule} | {'yes' if again else '-'} | {' | '.join(map(_cell, mine))} |")
    return lines


def _cell(row: dict[str, Any]) -> str:
    computed, measured = (f"{row[key] / 2**20:.2f}" for key in ("computed", "measured"))
    return f"{computed} / {measured} MiB, {row['seconds'] * 1e3:.0f} ms"


def _away(offload: bool | int) -> str:
    return {False: "-", True: "all"}[offload] if isinstance(offload, bool) else str(offload)


def plot(found: list[dict[str, Any]], title: str, path: Path) -> None:
    """A point a rung, seconds over bytes; those of a schedule are joined, from the plain one on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    marks = dict(zip(dict.fromkeys(row["way"] for row in found), "osv^Dx*", strict=False))
    figure, axes = plt.subplots(figsize=(9, 6))
    for schedule in dict.fromkeys(row["schedule"] for row in found):
        mine = [row for row in found if row["schedule"] == schedule]
        places = [row["measured"] / 2**20 for row in mine], [row["seconds"] * 1e3 for row in mine]
        (line,) = axes.plot(*places, lw=0.6, alpha=0.6, label=schedule)
        for row, x, y in zip(mine, *places, strict=True):
            axes.plot(x, y, marks[row["way"]], color=line.get_color(), ms=6)
    for way, mark in marks.items():
        axes.plot([], [], mark, color="gray", label=way if way != "-" else "neither")
    axes.set(title=title, xlabel="activations on the fullest rank, MiB", ylabel="step, ms")
    axes.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="measured steps, of which the median counts (default 3)")
    parser.add_argument("--only", default=",".join(SCHEDULES), help="comma-separated schedules")
    parser.add_argument("--out", type=Path, help="write FILE.json with the rows and FILE.png with a plot")
    args = parser.parse_args()
    only = tuple(args.only.split(","))
    if unknown := set(only) - set(SCHEDULES):
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}; there are {', '.join(SCHEDULES)}")
    if args.steps < 1:
        parser.error("--steps: at least 1")
    from cores import cores_of
    from output import write
    from ranks import run_ranks

    sizes, cases = Sizes(steps=args.steps), rungs(only)
    rows = run_ranks(measure_pinned, sizes.ranks, sizes, cases)
    found = [
        {"schedule": rung.name, "recompute": rung.recompute, "offload": rung.offload, "way": rung.way, **row}
        for rung, row in zip(cases, rows, strict=True)
    ]
    for row in found:
        assert row["losses"] == next(each for each in found if each["schedule"] == row["schedule"])["losses"], row
    title = f"{sizes.layers} blocks on {sizes.ranks} ranks, {sizes.micros} micro-batches, {cores_of(sizes.ranks)}"
    apart = max(abs(row["computed"] / row["measured"] - 1) for row in found)
    what = f"computed / measured bytes of the fullest rank, at most {apart:.1%} apart, and time of a step"
    print(title, what, "", *table(found), sep="\n")
    write(args.out, title, found, plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
