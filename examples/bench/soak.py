"""Memory and file descriptors of every rank over many steps, which must not grow.

python examples/bench/soak.py                            # 4 ranks, 1000 steps of the quick start's model, small
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path
from typing import Any

from ranks import run_ranks

WARM = 100  #: steps after which nothing may grow
LENGTH, BLOCKS, HIDDEN, MICRO_BATCHES = 16, 8, 32, 8


def footprint() -> tuple[float, int]:
    """Resident memory in MiB, and open file descriptors."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd"))


def soak(rank: int, schedule: str, steps: int, every: int) -> list[list[tuple[int, float, int]]]:
    """Train; for each rank the (step, MiB, descriptors) seen."""
    import torch
    from deepspeed.pipe import PipelineModule

    import dualpipe_engine

    sys.path.insert(0, str(Path(__file__).parent.parent))
    from gpt import VOCABULARY, layers, loss

    torch.manual_seed(1)
    world = torch.distributed.get_world_size()
    module = PipelineModule(layers(BLOCKS, HIDDEN, 4, LENGTH), num_stages=world, loss_fn=loss)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.002, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "steps_per_print": None,
        "pipeline": {"schedule": schedule},
    }
    engine, *_ = dualpipe_engine.initialize(model=module, config=config)
    generator = torch.Generator().manual_seed(2)

    def stream() -> Any:
        while True:
            text = torch.randint(0, VOCABULARY, (1, LENGTH + 1), generator=generator)
            yield text[:, :-1], text[:, 1:]

    data, seen = stream(), []
    for step in range(1, steps + 1):
        engine.train_batch(data)
        if step == WARM or step % every == 0:
            gc.collect()
            seen.append((step, *footprint()))
    gathered: list[Any] = [None] * world
    torch.distributed.all_gather_object(gathered, seen)
    return gathered


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", default="dualpipe", help="default: dualpipe")
    parser.add_argument("--ranks", type=int, default=4, help="pipeline ranks, one process each (default 4)")
    parser.add_argument("--steps", type=int, default=1000, help=f"more than {WARM} (default 1000)")
    args = parser.parse_args()
    if args.steps <= WARM:
        parser.error(f"--steps must be above {WARM}")
    found = run_ranks(soak, args.ranks, args.schedule, args.steps, max(1, args.steps // 10))

    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{args.schedule}, {args.ranks} ranks: MiB resident (descriptors)", title_justify="left")
    table.add_column("step", justify="right")
    for rank in range(args.ranks):
        table.add_column(f"rank {rank}", justify="right")
    for row in zip(*found, strict=True):
        table.add_row(str(row[0][0]), *(f"{memory:.1f} ({files})" for _, memory, files in row))
    growth = []
    for seen in found:
        base = next(each for each in seen if each[0] == WARM)
        growth.append((seen[-1][1] / base[1] - 1, seen[-1][2] - base[2]))
    table.add_row(f"since {WARM}", *(f"{memory:+.2%} ({files:+d})" for memory, files in growth))
    Console(width=110).print(table)
    return int(any(memory >= 0.01 or files > 0 for memory, files in growth))


if __name__ == "__main__":
    sys.exit(main())
