"""What the checks share: where they run, processes that play ranks, and waits of the device."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
CPU = os.environ.get("DUALPIPE_GPU_CHECK") == "cpu"  #: the same code, cheap sizes, and nothing that only a GPU can show
DEVICE = torch.device("cpu" if CPU else "cuda:0")
RANKS_S = 110.0  #: seconds that ranks are given; the limit of a check ends those that are left
Facts = dict[str, Any]
#: Runs a function of a module on that many ranks; returns what each has returned.
Run = Callable[..., list[Any]]


def asleep(milliseconds: float) -> None:
    """Keep the current stream busy; on the CPU nothing."""
    if not CPU:
        torch.cuda._sleep(int(milliseconds * 1.7e6))  # cycles


def synchronize() -> None:
    if not CPU:
        torch.cuda.synchronize()


def open_store() -> torch.distributed.TCPStore:
    """Where ranks meet: it listens already, so that nobody else can take its port, for as long as it is kept."""
    return torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def together(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the calls return. On a GPU, whose machine has cores to spare, at the same time."""
    with ThreadPoolExecutor(1 if CPU else len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def enter_rank(rank: int, world: int, port: int, backend: str = "gloo", device: str = "cuda") -> None:
    """Become a rank. All ranks share the one GPU, which NCCL refuses: gloo, with CUDA tensors staged."""
    if CPU or device == "cpu":
        os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", LOCAL_SIZE="0")
    else:
        torch.cuda.set_device(0)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world)


def _rank(rank: int, world: int, port: int, options: Facts, pipe: Any, function: Any, arguments: Facts) -> None:
    try:
        enter_rank(rank, world, port, **options)
        answer = (True, function(**arguments))
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))  # `send` would leave tensors in memory that goes with this process
    pipe.close()
    sys.stdout.flush()
    os._exit(0)  # threads of groups that are broken must not keep it


def run_ranks(world: int, function: Callable[..., Any], options: Facts | None = None, **arguments: Any) -> list[Any]:
    """Run `function(**arguments)` on ranks, each a process of its own.

    Args:
        world: number of ranks.
        function: of a module.
        options: of `enter_rank`.
        arguments: of the function.

    Raises:
        AssertionError: a rank failed, or has not answered in time; the message holds its traceback.
    """
    context, store, workers = mp.get_context("spawn"), open_store(), []
    for rank in range(world):
        ours, theirs = context.Pipe()
        worker = context.Process(
            target=_rank, args=(rank, world, store.port, options or {}, theirs, function, arguments)
        )
        worker.start()
        theirs.close()
        workers.append((worker, ours))
    answers: list[Any] = []
    until = time.monotonic() + RANKS_S
    try:
        for rank, (_, pipe) in enumerate(workers):
            assert pipe.poll(max(0.0, until - time.monotonic())), f"rank {rank} has not answered in {RANKS_S:.0f} s"
            try:
                good, answer = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            assert good, f"rank {rank}:\n{answer}"
            answers.append(answer)
    finally:
        for worker, _ in workers:
            worker.kill()
    return answers
