"""Ranks that are threads of one process, over gloo, and a stress test of random transfers; also run by sanitize.sh.

python tests/comm/stream_stress.py LIBRARY.so [TRANSFERS]        # the compiled helper of that file
"""

from __future__ import annotations

import importlib.util
import random
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

RANKS = 3
WAIT_S = 60.0


def gloo_group(store, rank, size):
    """A process group that torch.distributed does not know of, so that one process can hold several ranks."""
    group = dist.ProcessGroup(store, rank, size)
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=WAIT_S)
    options._threads = 2
    backend = dist.ProcessGroupGloo(store, rank, size, options)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):  # of CUDA tensors through host memory
        group._register_backend(torch.device(device), dist.ProcessGroup.BackendType.GLOO, backend)
    return group


def in_threads(function, size):
    """Call `function(rank)` on a thread for each rank; returns the results, raises the first error."""
    results, errors = [None] * size, []

    def run(rank):
        try:
            results[rank] = function(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT_S)
        assert not thread.is_alive(), "a rank hangs"
    if errors:
        raise errors[0]
    return results


def local_groups(size):
    store = dist.HashStore()
    return in_threads(lambda rank: gloo_group(store, rank, size), size)


def content(source, target, number, length):
    return torch.full((length,), float(number * 100 + source * 10 + target))


def stress(streams, groups, transfers, seed=0):
    """Random messages between all pairs of ranks and some all-to-alls, with pauses and waits in random order."""
    draw = random.Random(seed)
    size = len(groups)
    plan = []  # what every rank does, in one order
    for number in range(transfers):
        if number % 50 == 49:
            plan.append((number, None, None, draw.randint(1, 20)))
        else:
            source, target = draw.sample(range(size), 2)
            plan.append((number, source, target, draw.choice((1, 7, 300, 40_000))))

    def run(rank):
        mine = random.Random(seed + rank + 1)
        stream, group, open_tickets = streams[rank], groups[rank], []

        def settle(index):
            ticket, tensor, expected = open_tickets.pop(index)
            ticket.wait(WAIT_S)
            assert ticket.done()
            assert expected is None or torch.equal(tensor, expected)

        for number, source, target, length in plan:
            if source is None:
                rows = torch.full((length * size,), float(rank * 1000 + number))
                out = torch.empty_like(rows)
                splits = [length] * size
                expected = torch.cat([torch.full((length,), float(peer * 1000 + number)) for peer in range(size)])
                open_tickets.append((stream.all_to_all(group, out, rows, splits, splits, "all"), out, expected))
            elif rank == source:
                tensor = content(source, target, number, length)
                open_tickets.append((stream.send(group, tensor, target, number, f"to {target}"), None, None))
            elif rank == target:
                tensor = torch.empty(length)
                ticket = stream.recv(group, tensor, source, number, f"from {source}")
                open_tickets.append((ticket, tensor, content(source, target, number, length)))
            if mine.random() < 0.02:
                time.sleep(mine.random() * 2e-3)
            if len(open_tickets) > 40:  # the oldest first: they are what the others have posted too
                while len(open_tickets) > 20:
                    settle(mine.randrange(min(3, len(open_tickets))))
        while open_tickets:
            settle(mine.randrange(len(open_tickets)))

    in_threads(run, size)


def main():
    spec = importlib.util.spec_from_file_location("dualpipe_comm", sys.argv[1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    transfers = int(sys.argv[2]) if len(sys.argv) > 2 else 3000
    groups = local_groups(RANKS)
    streams = [module.CommStream("cpu") for _ in groups]
    stress(streams, groups, transfers)
    late = streams[0].recv(groups[0], torch.empty(3), 1, 0, "from rank 1")
    time.sleep(0.01)
    for stream in streams:
        stream.close()
    assert late.done()
    print(f"{transfers} transfers between {RANKS} ranks: good", flush=True)


if __name__ == "__main__":
    main()
