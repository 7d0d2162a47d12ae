"""Memory and file descriptors of every rank over many steps, which must not grow.

python examples/bench/soak.py                            # 4 ranks, 1000 steps of the quick start's model, small
python examples/bench/soak.py --size quickstart          # the same in the quick start's size

Resident memory is what the program uses and what glibc's allocator keeps for it after `free`. The second part varies
with the order in which messages arrive (by 1 to 3 % in the quick start) and hides a leak, so each reading first asks
glibc to give it back; `--untrimmed` reads without.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import Any

from ranks import run_ranks

WARM = 100  #: steps after which nothing may grow
SIZES = {"small": (16, 32, 1), "quickstart": (128, 128, 4)}  #: length, hidden size, micro-batch size
BLOCKS, MICRO_BATCHES = 8, 8


def footprint(trim: bool) -> tuple[float, int]:
    """Resident memory in MiB, without what is free if `trim`, and open file descriptors."""
    gc.collect()
    if trim and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd"))


def soak(rank: int, schedule: str, size: str, steps: int, every: int, trim: bool) -> list[list[tuple[int, float, int]]]:
    """Train; for each rank the (step, MiB, descriptors) seen."""
    import torch
    from deepspeed.pipe import PipelineModule

    import dualpipe_engine
    from dualpipe_engine.comm.from_all import from_all

    sys.path.insert(0, str(Path(__file__).parent.parent))
    from gpt import VOCABULARY, layers, loss

    length, hidden, micro_batch = SIZES[size]
    torch.manual_seed(1)
    world = torch.distributed.get_world_size()
    module = PipelineModule(layers(BLOCKS, hidden, 4, length), num_stages=world, loss_fn=loss)
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
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
            text = torch.randint(0, VOCABULARY, (micro_batch, length + 1), generator=generator)
            yield text[:, :-1], text[:, 1:]

    data, seen = stream(), []
    for step in range(1, steps + 1):
        engine.train_batch(data)
        if step == WARM or step % every == 0:
            seen.append((step, *footprint(trim)))
    return from_all(seen)


def growth(seen: list[tuple[int, float, int]]) -> tuple[float, int]:
    """Of one rank since step `WARM`: memory as a share, and descriptors."""
    base = next(each for each in seen if each[0] == WARM)
    return seen[-1][1] / base[1] - 1, seen[-1][2] - base[2]


def flat(found: list[list[tuple[int, float, int]]]) -> bool:
    """Whether the memory of every rank grew by less than 1 %, and descriptors not at all."""
    return all(memory < 0.01 and files <= 0 for memory, files in map(growth, found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", default="dualpipe", help="default: dualpipe")
    parser.add_argument("--ranks", type=int, default=4, help="pipeline ranks, one process each (default 4)")
    parser.add_argument("--steps", type=int, default=1000, help=f"more than {WARM} (default 1000)")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model and batch (default small)")
    parser.add_argument("--untrimmed", action="store_true", help="with what glibc keeps")
    args = parser.parse_args()
    if args.steps <= WARM:
        parser.error(f"--steps must be above {WARM}")
    every = max(1, args.steps // 20)  # one reading within the warm-up: the first trim is not like the later ones
    found = run_ranks(soak, args.ranks, args.schedule, args.size, args.steps, every, not args.untrimmed)

    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{args.schedule}, {args.size}, {args.ranks} ranks: MiB resident (descriptors)", title_justify="left"
    )
    table.add_column("step", justify="right")
    for rank in range(args.ranks):
        table.add_column(f"rank {rank}", justify="right")
    for row in zip(*found, strict=True):
        table.add_row(str(row[0][0]), *(f"{memory:.1f} ({files})" for _, memory, files in row))
    table.add_row(f"since {WARM}", *(f"{memory:+.2%} ({files:+d})" for memory, files in map(growth, found)))
    Console(width=110).print(table)
    return int(not flat(found))


if __name__ == "__main__":
    sys.exit(main())
