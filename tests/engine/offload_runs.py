"""Runs with activations in host memory, started on pooled ranks."""

from __future__ import annotations

import json
import threading
import time

import moe_runs
import training
from torch import nn

from dualpipe_engine.comm.copies import ThreadCopyist
from dualpipe_engine.runtime import offload

MODEL = {"q_rank": 8, "dense_blocks": 2, "blocks": 6, "expert_parallel": 1}


class Copyist(ThreadCopyist):
    """Counts, and makes each copy late.

    Args:
        late_s: seconds.
    """

    def __init__(self, late_s=0.0):
        super().__init__()
        self.late_s, self.size = late_s, 0

    def copy(self, name, pairs):
        self.size += sum(target.nbytes for target, _ in pairs)
        return super().copy(name, _Late(pairs, self.late_s))


class _Late(list):
    def __init__(self, pairs, seconds):
        super().__init__(pairs)
        self._seconds = seconds

    def __iter__(self):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(self._seconds)
        return super().__iter__()


def plant(engine, late_s=0.0):
    """Everything leaves, however small; copies back are late."""
    offload.LEAST = 0
    if engine._offload is not None:
        engine._offload._out, engine._offload._back = Copyist(), Copyist(late_s)
    return engine


def train(cases, ranks, replicas=1, **more):
    """For each case losses and weights after two steps, and what was copied."""
    return training.each(lambda **case: _train(ranks=ranks, replicas=replicas, **more, **case), cases)


def _train(ranks, replicas, zero, schedule, model=None, micros=6, steps=2, precision="fp32", **pipeline):
    import dualpipe_engine

    module = moe_runs.make_module(moe_runs.config(**(MODEL | (model or {}))), ranks, replicas)
    config = training.settings(micros, replicas, zero=zero, schedule=schedule, precision=precision, **pipeline)
    replica = module._grid.data_parallel_id
    engine, *_ = dualpipe_engine.initialize(model=module, config=config)
    plant(engine)
    data = training.stream(replica)
    found = {
        "losses": [float(engine.train_batch(data)) for _ in range(steps)],
        "weights": {name: training.digest(value) for name, value in training.weights(engine).items()},
        "copies": sum(op.kind == "OFFLOAD" for op in engine.plan.programs[engine.place.rank]),
        "split": engine._store is not None,
    }
    if (moved := engine._offload) is not None:
        found |= {"out": moved._out.size, "back": moved._back.size, "left": moved.host_bytes() + len(moved._saved)}
    engine.destroy()
    return found


def refused(**case):
    """Type and sentence of the error on this rank."""
    return training.refusals(_train, {"": {"replicas": 1, **case}})[""]


def small(late_s=0.0, folder=None, **pipeline):
    """One step of a small model, whose copies back are late, and what the profile shows of the first rank."""
    from deepspeed.pipe import PipelineModule

    import dualpipe_engine
    from dualpipe_engine.profiling.profile import KEY
    from dualpipe_engine.utils import disable_profiling, enable_profiling, get_profiler

    micros = 4
    training.torch.manual_seed(3)
    module = PipelineModule([training.Block() for _ in range(4)], num_stages=2, loss_fn=nn.functional.mse_loss)
    config = training.settings(micros, schedule="zb1p", **pipeline)
    engine, *_ = dualpipe_engine.initialize(model=module, config=config)
    plant(engine, late_s)
    if folder is not None:
        enable_profiling(log_dir=folder)
    x = training.torch.ones(2, training.LENGTH, training.WIDTH)
    found = {"losses": float(engine.train_batch(iter([(x, x)] * micros)))}
    if folder is not None:
        found["copies"] = sum(op.kind == "RELOAD" for op in engine.plan.programs[engine.place.rank])
        found["waited"] = sum(each.waited for each in engine._transfers if each.name == "reload")
        path = get_profiler().save_to_file("profile.json")
        disable_profiling()
        if training.torch.distributed.get_rank() == 0:
            saved = json.loads(path.read_text())
            found["names"] = [event["name"] for event in saved["traceEvents"]]
            found["exposed"] = saved[KEY]["ranks"][0]["seconds"]
    engine.destroy()
    return found
