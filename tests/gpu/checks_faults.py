"""A rank that is killed or stopped ends the others in time, and they name it."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

from checks_engine import SIZES, _settings, start, stream
from common import CPU, Facts, Run, enter_rank, open_store, together

TIMEOUT_S, START_S = 12.0, 45.0


def lost_ranks(run: Run) -> Facts:
    faults = ("kill",) if CPU else ("kill", "stop")
    return dict(zip(faults, together([partial(struck, fault) for fault in faults]), strict=True))


def struck(fault: str, ranks: int = 2 if CPU else 4) -> Facts:
    """Rank 1 is struck between two batches; seconds until the others have ended."""
    lost, context = 1, mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder, store = Path(name), open_store()
        workers = [context.Process(target=_train, args=(rank, ranks, store.port, folder)) for rank in range(ranks)]
        for worker in workers:
            worker.start()
        others = [worker for rank, worker in enumerate(workers) if rank != lost]
        try:
            until = time.monotonic() + START_S
            while len(list(folder.glob("trained*"))) < ranks:
                assert time.monotonic() < until, "the ranks have not trained: " + _logs(folder)
                time.sleep(0.05)
            os.kill(workers[lost].pid or 0, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
            since = time.monotonic()
            while any(worker.is_alive() for worker in others) and time.monotonic() - since < 2 * TIMEOUT_S:
                time.sleep(0.02)
            seconds = time.monotonic() - since
            logs = _logs(folder)
            assert not any(worker.is_alive() for worker in others), f"{fault}: ranks go on waiting: {logs}"
        finally:
            for worker in workers:
                worker.kill()
                worker.join()
        for rank, worker in enumerate(workers):
            text = (folder / f"log{rank}").read_text(errors="replace")
            assert rank == lost or worker.exitcode, f"{fault}: rank {rank} has ended as if all were well"
            assert rank == lost or f"rank {lost} is lost" in text, f"{fault}: rank {rank} does not say why:\n{text}"
    assert seconds <= 1.5 * TIMEOUT_S, f"{fault}: the others took {seconds:.1f} s"
    return {"seconds": round(seconds, 1)}


def _train(rank: int, ranks: int, port: int, folder: Path) -> None:
    with open(folder / f"log{rank}", "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        enter_rank(rank, ranks, port)
        model = SIZES | {"blocks": ranks, "dense_blocks": ranks}
        config = _settings("dualpipe", 2 * ranks, p2p_timeout_s=TIMEOUT_S)
        engine, replica = start(config, model, ranks)
        data = stream(replica)
        engine.train_batch(data)
        (folder / f"trained{rank}").touch()
        while True:
            engine.train_batch(data)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(1)


def _logs(folder: Path) -> str:
    return "\n".join(file.read_text(errors="replace")[-1500:] for file in sorted(folder.glob("log*")))
