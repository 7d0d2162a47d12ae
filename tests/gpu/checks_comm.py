"""Checks of the communication stream, which need no DeepSpeed."""

from __future__ import annotations

import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from common import CPU, DEVICE, Facts, Run, asleep, synchronize

from dualpipe_engine.comm.all_to_all import Counts, _Exchange
from dualpipe_engine.comm.communicators import close, put_beside
from dualpipe_engine.comm.device import EventMoment, side_stream
from dualpipe_engine.comm.stream import open_stream
from dualpipe_engine.comm.tickets import Tickets


def helper(run: Run) -> Facts:
    """The C++ helper builds against this torch and opens a stream for the device."""
    import dualpipe_engine

    how = "python" if CPU else "build"
    start = time.monotonic()
    open_stream(DEVICE, how).close()
    return {"how": how, "seconds": time.monotonic() - start, "folder": Path(dualpipe_engine.__file__).parent.name}


def wait_returns(run: Run) -> Facts:
    """An all-to-all behind 200 ms of device work: `wait` gives the host back at once, and the rows are right. Rows that
    follow their counts do not wait for later work."""
    options = {} if CPU else {"device_id": DEVICE}
    dist.init_process_group("gloo" if CPU else "nccl", store=dist.HashStore(), rank=0, world_size=1, **options)
    group, found = dist.group.WORLD, {}
    for how in ("python",) if CPU else ("python", "build"):
        stream = open_stream(DEVICE, how)
        rows = torch.arange(1 << 16, dtype=torch.float32, device=DEVICE)
        for measured in (False, True):  # the first connects
            out = torch.zeros_like(rows)
            asleep(200.0)
            rows = rows + 1
            ticket = stream.all_to_all(group, out, rows, [len(rows)], [len(rows)], "all-to-all")
            start = time.perf_counter()
            ticket.wait(60.0)
            seconds = time.perf_counter() - start
            after = out + 0.0  # on the current stream, which is to wait
            synchronize()
            assert torch.equal(after, rows), f"{how}: the rows that came are not those that were sent"
            if measured:
                found[f"{how}_wait_ms"] = seconds * 1e3
        _rows_that_are_ready(group, stream, how)
        stream.close()
    for name, milliseconds in found.items():
        assert CPU or milliseconds < 5.0, f"{name}: the host stood still for {milliseconds:.1f} ms"
    return found


def _rows_that_are_ready(group: Any, posts: Any, how: str) -> None:
    """Rows travel as soon as the host has their counts, which came over a communicator of their own, not behind what
    the device was given to compute since, whose memory they leave alone."""
    counting = open_stream(DEVICE, how)
    put_beside(group, beside := dist.new_group([0]))
    stream: Any = SimpleNamespace(posts=posts, counts=counting, side=side_stream(DEVICE))
    start = None if CPU else EventMoment(torch.cuda.current_stream())
    base = torch.arange(1 << 20, dtype=torch.float32, device=DEVICE)
    asleep(20.0)
    rows = base + 1
    counts = Counts(torch.tensor([len(rows)], device=DEVICE), group, None, stream)
    for _ in range(20):
        asleep(5.0)
        torch.full_like(rows, -1.0)
    busy = None if CPU else EventMoment(torch.cuda.current_stream())
    tickets = Tickets()
    out = _Exchange.apply(rows, counts.send, counts.receive, True, group, tickets, stream)
    moments = tickets.moments()
    tickets.wait(60.0)
    assert torch.equal(out, base + 1), f"{how}: rows that were ready are wrong"
    if start is not None and busy is not None:
        ends = [moment.since(start._event) for each in moments for moment in each[1:2] if moment is not None]
        assert ends and max(ends) < busy.since(start._event), f"{how}: rows that were ready waited for later work"
    counting.close()
    close([beside])


def staging(run: Run) -> Facts:
    """Random transfers over gloo: what is sent is made late and dropped at once; its memory is used again."""
    transfers = 60 if CPU else 500
    received = run(2 if CPU else 3, exchange_at_random, transfers=transfers)
    assert sum(received) == transfers, f"{received} of {transfers} transfers were received"
    return {"transfers": transfers}


def exchange_at_random(transfers: int) -> int:
    """On each rank; how many it has received."""
    rank, size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    stream = open_stream(DEVICE, "python" if CPU else None)
    draw, mine, checked = random.Random(7), random.Random(rank), 0
    plan = [(*draw.sample(range(size), 2), draw.choice((1, 7, 300, 40_000, 1 << 20))) for _ in range(transfers)]
    open_tickets: list[tuple[Any, torch.Tensor | None, int]] = []
    for number, (source, target, length) in enumerate(plan):
        if rank == source:
            if mine.random() < 0.1:
                asleep(mine.random() * 5.0)
            tensor = torch.full((length,), float(number), device=DEVICE)
            open_tickets.append((stream.send(group, tensor, target, number, f"to {target}"), None, number))
            del tensor
            torch.full((length,), -1.0, device=DEVICE)  # likely in the same memory
        elif rank == target:
            tensor = torch.empty(length, device=DEVICE)
            ticket = stream.recv(group, tensor, source, number, f"from {source}")
            open_tickets.append((ticket, tensor, number))
        while len(open_tickets) > 20:
            checked += _settle(*open_tickets.pop(0))
    for each in open_tickets:
        checked += _settle(*each)
    dist.barrier()  # a send is done for its peer, too
    stream.close()
    return checked


def _settle(ticket: Any, tensor: torch.Tensor | None, number: int) -> int:
    ticket.wait(60.0)
    if tensor is None:
        return 0
    wrong = int((tensor != number).sum())
    assert not wrong, f"transfer {number}: {wrong} of {tensor.numel()} elements are wrong"
    return 1
