"""Ranks that raise the same error, or not."""

from __future__ import annotations

import torch.distributed as dist
import training


def compared():
    from dualpipe_engine.faults.alike import Alike
    from dualpipe_engine.faults.watch import _share

    alike, rank, found = Alike(_share), dist.get_rank(), {}
    for name in ("alike", "elsewhere", "alone"):
        try:
            if name == "alone" and rank == 1:
                found[name] = False
                continue
            if name == "elsewhere" and rank == 1:
                raise ValueError(name)
            raise ValueError(f"{name} on rank {rank}")
        except ValueError as error:
            found[name] = alike.raised_by_all(error)
    dist.barrier()
    return found


def refused_by_deepspeed():
    """The errors of calls that DeepSpeed refuses, and the loss of a batch on the same ranks after them."""
    import dualpipe_engine

    config = training.settings(2, schedule="1f1b")
    optimizers = {
        "untested": {"type": "SGD", "params": {"lr": 0.1}},
        "unsupported": {"type": "OneBitAdam", "params": {"lr": 0.1}},
        "argument": {"type": "Adam", "params": {"learning_rate": 0.1, "torch_adam": True}},
    }
    errors = {}
    for name, optimizer in optimizers.items():
        errors[name] = error_of(
            dualpipe_engine.initialize, model=training.make_module(2, 4), config=config | {"optimizer": optimizer}
        )
    engine, *_ = dualpipe_engine.initialize(model=training.make_module(2, 4), config=config)
    loss = float(engine.train_batch(training.stream(0)))
    engine.destroy()
    return errors, loss


def error_of(call, *args, **kwargs):
    try:
        found = call(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", str(found)
