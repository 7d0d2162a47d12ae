"""Where a step's time on the host goes: what the thread that trains is in, looked at once a millisecond.

A timer's signal interrupts the thread between two Python instructions; what it finds on the stack is given all the time
since the last look. While a wait holds the thread in C++ no signal is seen, and the wait gets all of it at its end. So
the times add up to the step, and what is measured is disturbed by some 10 microseconds in a thousand.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from dualpipe_engine.schedule.op import COMM, REDUCE, STEP
from dualpipe_engine.schedule.progress import Position, is_waiting

INTERVAL_S = 1e-3
WAITING, MODEL, OTHER, BETWEEN = "waiting", "model", "other", "between ops"
#: Modules and what they are called here. The innermost one on the stack counts, the longest name that fits.
PARTS = {
    "dualpipe_engine.comm": "posting and sending",
    "dualpipe_engine.comm.all_to_all": "expert exchange",
    "dualpipe_engine.comm.meta": "header and flattening",
    "dualpipe_engine.comm.nest": "header and flattening",
    "dualpipe_engine.comm.stream": "tickets",
    "dualpipe_engine.comm.python_stream": "tickets",
    "dualpipe_engine.comm.tickets": "tickets",
    "dualpipe_engine.engine": "engine",
    "dualpipe_engine.engine.batches": "data",
    "dualpipe_engine.engine.reduction": "reduction",
    "dualpipe_engine.engine.checks": "checks",
    "dualpipe_engine.faults": "lost ranks",
    "dualpipe_engine.runtime": "executor and stages",
    "dualpipe_engine.runtime.borders": "borders",
    "dualpipe_engine.runtime.observer": "observer",
    "dualpipe_engine.runtime.weight_grad": "splitting",
    "dualpipe_engine.runtime.weight_grad_mode": "splitting",
    "dualpipe_engine.runtime.weight_grad_ops": "splitting",
    "dualpipe_engine.runtime.weight_grad_split": "splitting",
    "dualpipe_engine.schedule.progress": "positions",
    "sleeping": MODEL,
    "torch.autograd": "autograd",
    "deepspeed": "DeepSpeed",
    "deepspeed.comm": "posting and sending",
    "deepspeed.runtime.pipe.p2p": "posting and sending",
    "torch.distributed": "posting and sending",
    "torch.distributed.pipelining": "torch.distributed.pipelining",
    "torch.optim": "optimizer",
}
#: Words in the names of functions that hold their caller until a transfer is done; the `recv` of others does, too.
WAITS = frozenset(("wait", "waiting", "flush", "synchronize", "barrier"))

Place = tuple[str, str]  #: part, kind of op


class Look:
    """Looks at the calling thread, which must be the process's main one.

    Args:
        position: of the engine in its program; None: it has none to show.

    Attributes:
        seconds: of each part and kind of op.
    """

    def __init__(self, position: Position | None) -> None:
        self._position, self._thread = position, threading.get_ident()
        self.seconds: Counter[Place] = Counter()
        self._last = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Look on while the body runs."""
        before = signal.signal(signal.SIGALRM, self._see)
        self._last = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, INTERVAL_S, INTERVAL_S)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            self._add((OTHER, BETWEEN))
            signal.signal(signal.SIGALRM, before)

    def _see(self, number: int, frame: FrameType | None) -> None:
        position = self._position
        waits = is_waiting(self._thread) or (position is not None and position.awaits is not None)
        op = None if position is None else position.op
        self._add((WAITING if waits else part_of(frame), BETWEEN if op is None else op.kind))

    def _add(self, place: Place) -> None:
        now = time.perf_counter()
        self.seconds[place] += now - self._last
        self._last = now


def part_of(frame: FrameType | None) -> str:
    """What the innermost frame of a known module belongs to."""
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        name = module
        while name and name not in PARTS:
            name = name.rpartition(".")[0]
        if name:
            words = frame.f_code.co_name.split("_")
            holds = not WAITS.isdisjoint(words) or ("recv" in words and not name.startswith("dualpipe_engine"))
            return WAITING if holds else PARTS[name]
        frame = frame.f_back
    return OTHER


def look_at(step: Callable[[], Any], steps: int, position: Position | None) -> dict[str, Any]:
    """Run steps and look on.

    Returns:
        "step": seconds of one; "parts": [part, kind of op, seconds of a step], the longest first.
    """
    step()  # warms up
    look = Look(position)
    start = time.perf_counter()
    with look.running():
        for _ in range(steps):
            step()
    seconds = (time.perf_counter() - start) / steps
    parts = [[part, kind, total / steps] for (part, kind), total in look.seconds.most_common()]
    return {"step": seconds, "parts": parts}


def columns(kinds: Sequence[str]) -> list[str]:
    """Kinds of ops in the order in which a table shows them: computation, transfers, the end of a step."""
    last = (REDUCE, STEP, BETWEEN)
    return sorted(kinds, key=lambda kind: (last.index(kind) + 1 if kind in last else 0, kind in COMM, kind))


def table(row: dict[str, Any]) -> Any:
    """Milliseconds of a step by part and kind of op, mean of the ranks."""
    from rich.table import Table

    kinds = columns(sorted({kind for _, kind, _ in row["parts"]}))
    times: dict[str, Counter[str]] = {}
    for part, kind, seconds in row["parts"]:
        times.setdefault(part, Counter())[kind] += seconds
    out = Table(title=f"{row['name']}: {row['step'] * 1e3:.1f} ms a step", title_justify="left")
    out.add_column("ms of a step")
    for kind in [*kinds, "all"]:
        out.add_column(kind, justify="right")
    for part, of_kind in sorted(times.items(), key=lambda each: -each[1].total()):
        cells = [f"{of_kind[kind] * 1e3:.1f}" if of_kind[kind] else "" for kind in kinds]
        out.add_row(part, *cells, f"{of_kind.total() * 1e3:.1f}")
    whole: Counter[str] = sum(times.values(), Counter())
    out.add_section()
    out.add_row("all", *(f"{whole[kind] * 1e3:.1f}" for kind in kinds), f"{whole.total() * 1e3:.1f}")
    return out
