"""What saving a checkpoint costs the training: step times without a save, with one in the background, with a plain one.

    python examples/bench/saving.py                     # 2 ranks, 15 rounds of 10 steps each, a save in the middle

The three kinds take turns, so that each meets the same machine, and the order changes from round to round. The time of
a round includes its save, until the checkpoint has its name. Shown are medians over the rounds; a ratio is taken within
its round. The last line is what no way of saving can avoid where all cores compute: the processor time of a save in the
background, copy and thread, as a part of that of the steps.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from ranks import run_ranks

WIDTH, LAYERS, ROWS, MICROS = 512, 8, 512, 8
KINDS = {"no save": None, "in the background": True, "plain": False}


def measure(rank: int, ranks: int, steps: int, rounds: int, folder: str) -> dict[str, list[float]]:
    """Seconds of each round by kind; under "bytes" the size of a checkpoint, under "processor" the processor seconds of
    a save in the background on the rank that has most of it."""
    engines = {kind: _engine(ranks, background) for kind, background in KINDS.items()}
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    kinds = list(KINDS)
    for turn in range(rounds + 1):
        for kind in kinds[turn % 3 :] + kinds[: turn % 3]:
            seconds = _run(engines[kind], steps, None if KINDS[kind] is None else f"{folder}/{kind}")
            if turn:  # the first one is for warming up
                found[kind].append(seconds)
    found["processor"] = [_processor(engines["in the background"], f"{folder}/alone")]
    for engine in engines.values():
        engine.destroy()
    torch.distributed.barrier()
    found["bytes"] = [sum(path.stat().st_size for path in Path(folder, "plain", "last").iterdir())]
    return found


def _engine(ranks: int, background: bool | None) -> Any:
    from deepspeed.pipe import LayerSpec, PipelineModule

    import dualpipe_engine

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": MICROS,
        "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "steps_per_print": None,
        "checkpoint": {"async": bool(background)},
        "pipeline": {"schedule": "dualpipe"},
    }
    layers = [LayerSpec(torch.nn.Linear, WIDTH, WIDTH) for _ in range(LAYERS)]
    module = PipelineModule(layers, num_stages=ranks, loss_fn=torch.nn.functional.mse_loss, partition_method="uniform")
    return dualpipe_engine.initialize(model=module, config=config)[0]


def _run(engine: Any, steps: int, folder: str | None) -> float:
    sample = (torch.ones(ROWS, WIDTH), torch.zeros(ROWS, WIDTH))
    torch.distributed.barrier()
    start = time.perf_counter()
    for step in range(steps):
        if folder is not None and step == steps // 2:
            engine.save_checkpoint(folder, tag="last")
        engine.train_batch(iter([sample] * MICROS))
    engine.wait_for_checkpoint()
    torch.distributed.barrier()
    return time.perf_counter() - start


def _processor(engine: Any, folder: str) -> float:
    """Of all threads of the process, while nothing else is done."""
    seconds = []
    for _ in range(3):
        torch.distributed.barrier()
        start = time.process_time()
        engine.save_checkpoint(folder, tag="last")
        engine.wait_for_checkpoint()
        seconds.append(time.process_time() - start)
    most = torch.tensor(median(seconds))
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return float(most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="pipeline ranks, one process each (default 2)")
    parser.add_argument("--steps", type=int, default=10, help="steps of a round, with one save (default 10)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that are measured (default 15)")
    args = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="dualpipe_saving_")
    try:
        found = run_ranks(measure, args.ranks, args.ranks, args.steps, args.rounds, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    from rich.console import Console
    from rich.table import Table

    (size,), (processor,) = found.pop("bytes"), found.pop("processor")
    title = f"{args.ranks} ranks, a save of {size / 1e6:.0f} MB in {args.steps} steps"
    table = Table(title=title, title_justify="left")
    for column in ("kind", "step (ms)", "of no save", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    base = found["no save"]
    for kind, seconds in found.items():
        ratios = [one / other for one, other in zip(seconds, base, strict=True)]
        shown = [f"{each:.3f}" for each in (median(ratios), min(ratios), max(ratios))]
        table.add_row(kind, f"{median(seconds) / args.steps * 1e3:.1f}", *shown)
    console = Console(width=100)
    console.print(table)
    share = processor / median(base)
    console.print(f"processor time of a save: {processor * 1e3:.0f} ms a rank, {share:.3f} of the steps")


if __name__ == "__main__":
    main()
