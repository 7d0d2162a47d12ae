"""What profiling costs: steps with it and without any recording, in turns, so that the machine's moods hit both.

"With" is `enable_profiling()`; "without" is an engine whose observer does nothing at all, less than profiling off.

    python examples/bench/profiling.py                  # 4 ranks, 16 micro-batches, F = I = W = 5 ms of sleep
    python examples/bench/profiling.py --op 0           # no computation: the cost of each step alone
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from statistics import median, quantiles
from typing import Any

import torch.distributed as dist
from ranks import run_ranks
from sleeping import Times


class Silent:
    """An observer that observes nothing."""

    nvtx = False
    _nothing = contextlib.nullcontext()

    def start_batch(self) -> None: ...

    def end_batch(self, transfers: Any = ()) -> None: ...

    def span(self, op: Any) -> Any:
        return self._nothing

    def waiting(self, kind: str, op: Any = None) -> Any:
        return self._nothing

    def now(self) -> None: ...

    def waited(self, kind: str, op: Any, start: Any) -> None: ...

    def reducing(self) -> Silent:
        return self

    def stop(self) -> None: ...


def measure(rank: int, schedule: str, micros: int, times: Times, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of the steps with and without profiling; runs on every rank."""
    from contestants import Job, deepspeed_engine, micro_batches

    import dualpipe_engine
    from dualpipe_engine.utils import disable_profiling, enable_profiling

    size = dist.get_world_size()
    job = Job(size, micros, times)
    engine = deepspeed_engine(job, dualpipe_engine.initialize, 2 * size, schedule=schedule)
    data, silent, observer = micro_batches(), Silent(), engine._observer

    def step(profiled: bool) -> float:
        used = observer if profiled else silent
        engine._observer = engine._context.observer = engine._executor._observer = used
        engine._tail.reduction._side_stream._observer = used
        if not profiled:
            disable_profiling()
        dist.barrier()
        start = time.perf_counter()
        engine.train_batch(data)
        dist.barrier()
        return time.perf_counter() - start

    found: tuple[list[float], list[float]] = ([], [])
    for number in range(pairs + 2):
        for profiled in _turns(number):
            if profiled:
                enable_profiling()
            seconds = step(profiled)
            if number >= 2:
                found[0 if profiled else 1].append(seconds)
    return found


def _turns(number: int) -> Iterator[bool]:
    yield from (True, False) if number % 2 else (False, True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="pipeline ranks, one process each (default 4)")
    parser.add_argument("--micro-batches", type=int, default=16, help="micro-batches of a step (default 16)")
    parser.add_argument("--schedule", default="dualpipe", help="default: dualpipe")
    parser.add_argument("--op", type=float, default=5.0, help="milliseconds of F, of I and of W (default 5)")
    parser.add_argument("--pairs", type=int, default=30, help="pairs of a step with and one without (default 30)")
    args = parser.parse_args()
    times = Times(*[args.op / 1e3] * 3)
    on, off = run_ranks(measure, args.ranks, args.schedule, args.micro_batches, times, args.pairs)
    ratios = [a / b - 1 for a, b in zip(on, off, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    print(f"step without {median(off) * 1e3:.2f} ms, with profiling {median(on) * 1e3:.2f} ms (medians of {len(on)})")
    print(f"overhead {median(ratios):+.2%} of a step (median of pairs; half of them within {low:+.2%} to {high:+.2%})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
