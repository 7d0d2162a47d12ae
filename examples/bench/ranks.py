"""Starts the ranks of a benchmark on this machine."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], ranks: int, *args: Any) -> Any:
    """Call `function(rank, *args)` on `ranks` processes with torch.distributed (gloo) ready; returns rank 0's result.

    Raises:
        RuntimeError: a rank failed; its traceback is in the text.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    workers = [context.Process(target=_work, args=(rank, ranks, port, queue, function, args)) for rank in range(ranks)]
    for worker in workers:
        worker.start()
    good, value = queue.get()  # of rank 0, or of the first rank that failed
    for worker in workers:
        if not good:
            worker.kill()
        worker.join()
    if not good:
        raise RuntimeError(value)
    return value


def _work(rank: int, ranks: int, port: int, queue: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", LOCAL_SIZE="0", TORCH_CPP_LOG_LEVEL="ERROR")
    os.environ["PYTHONWARNINGS"] = "ignore"
    import deepspeed
    import torch
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    torch.set_num_threads(1)
    try:
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        value = function(rank, *args)
        torch.distributed.barrier()
        if rank == 0:
            queue.put((True, value))
    except BaseException:
        queue.put((False, f"rank {rank}:\n{traceback.format_exc()}"))
