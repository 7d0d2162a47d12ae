"""A program of two ranks, one of which raises between two batches, under each way to start ranks.

python between.py [fork | spawn | torch]    # else a launcher has started this rank
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "engine")]


def main(rank=None, folder=None):
    import deepspeed
    import torch
    import training

    import dualpipe_engine

    if rank is not None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    config = training.settings(4, schedule="dualpipe", p2p_timeout_s=20)
    engine, *_ = dualpipe_engine.initialize(model=training.make_module(2, 2), config=config)
    data = training.stream(0)
    engine.train_batch(data)
    torch.distributed.barrier()
    if engine.global_rank == 1:
        raise LookupError("poisoned")
    try:
        engine.train_batch(data)
    except Exception as error:
        Path(folder or sys.argv[-1], "told").write_text(str(error))
        raise


if __name__ == "__main__":
    how, place = sys.argv[-2:]
    if how == "torch":
        import torch.multiprocessing

        torch.multiprocessing.spawn(main, (place,), nprocs=2)
    elif how in ("fork", "spawn"):
        context = multiprocessing.get_context(how)
        workers = [context.Process(target=main, args=(rank, place)) for rank in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        sys.exit(max(abs(worker.exitcode) for worker in workers))
    else:
        main()
