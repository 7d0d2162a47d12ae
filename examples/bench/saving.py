"""What saving a checkpoint costs the training: step times without a save, with one in the background, with a plain one.

    python examples/bench/saving.py                     # 2 ranks, 30 steps each, a save after every tenth

The three kinds take turns, so that each meets the same machine. A step's time includes the save that follows it.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ranks import run_ranks

WIDTH, LAYERS, ROWS, MICROS = 512, 8, 512, 8
KINDS = {"no save": None, "in the background": True, "plain": False}


def measure(rank: int, ranks: int, steps: int, every: int, rounds: int, folder: str) -> dict[str, list[float]]:
    """Seconds of each round's steps by kind, and under "bytes" the size of a checkpoint."""
    engines = {kind: _engine(ranks, background) for kind, background in KINDS.items()}
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(rounds + 1):
        for kind, engine in engines.items():
            seconds = _run(engine, steps, every, None if KINDS[kind] is None else f"{folder}/{kind}")
            if turn:  # the first one is for warming up
                found[kind].append(seconds)
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


def _run(engine: Any, steps: int, every: int, folder: str | None) -> float:
    sample = (torch.ones(ROWS, WIDTH), torch.zeros(ROWS, WIDTH))
    torch.distributed.barrier()
    start = time.perf_counter()
    for step in range(1, steps + 1):
        engine.train_batch(iter([sample] * MICROS))
        if folder is not None and step % every == 0:
            engine.save_checkpoint(folder, tag="last")
    torch.distributed.barrier()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="pipeline ranks, one process each (default 2)")
    parser.add_argument("--steps", type=int, default=30, help="steps of a round (default 30)")
    parser.add_argument("--every", type=int, default=10, help="steps from save to save (default 10)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that are measured (default 3)")
    args = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="dualpipe_saving_")
    try:
        found = run_ranks(measure, args.ranks, args.ranks, args.steps, args.every, args.rounds, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    from rich.console import Console
    from rich.table import Table

    (size,) = found.pop("bytes")
    title = f"{args.ranks} ranks, a save of {size / 1e6:.0f} MB after every {args.every} steps"
    table = Table(title=title, title_justify="left")
    for column in ("kind", "step [ms]", "of no save"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    base = min(found["no save"])
    for kind, seconds in found.items():
        table.add_row(kind, f"{min(seconds) / args.steps * 1e3:.1f}", f"{min(seconds) / base:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
