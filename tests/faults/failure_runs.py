"""Batches that fail on one rank, on forked ranks, beside an engine that never sees them."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import islice
from unittest.mock import patch

import torch
import torch.distributed as dist
import training
from torch import nn

MICROS = 4


class Boom(Exception):
    pass


def boom(*_):
    raise Boom("poisoned")


class Stumbling:
    """Raises once, instead of micro-batch 2."""

    def __init__(self, batch):
        self.batch, self.read = iter(batch), 0

    def __iter__(self):
        return self

    def __next__(self):
        self.read += 1
        return boom() if self.read == 3 else next(self.batch)


def start(ranks, config, **module):
    import dualpipe_engine

    made = training.make_module(ranks, 2 * ranks, **module)
    return dualpipe_engine.initialize(model=made, config=config)[0]


def calls(number, function):
    """`function` at the call of that number, None before and after."""
    count = iter(range(number + 1))

    def call(*arguments):
        return function(*arguments) if next(count, -1) == number else None

    return call


@contextmanager
def armed(engine, case, here, batch):
    """What a rank is to read, while it goes wrong in the way of `case`: only `here`, where one rank is meant."""
    block = next(part for part in engine.module.modules() if isinstance(part, training.Block))
    handles, data, last = [], iter(batch), None
    if case == "end":
        data = iter(batch[:3])
    elif case == "border":
        data = iter([])
    elif case == "no batch":
        data = iter([*batch[:2], 3, batch[3]])
    elif case == "loader" and here:
        data = Stumbling(batch)
    elif case == "layer" and here:
        handles.append(block.register_forward_pre_hook(calls(1, boom)))
    elif case == "backward" and here:

        def spoil(module, inputs, output):
            output.register_hook(boom)

        handles.append(block.register_forward_hook(calls(1, spoil)))
    elif case in ("structure", "many") and here:
        wrong = {"structure": 2, "many": 70}[case]
        ends = [
            part for part in engine._context.views[min(engine._chunks)].forward_funcs if isinstance(part, nn.Module)
        ]
        handles.append(ends[-1].register_forward_hook(lambda module, inputs, output: (output,) * wrong))
    elif case in ("none", "shape") and here:
        wrong = {"none": lambda x: None, "shape": lambda x: x[:, :1]}[case]
        spoilt = patch.object(block, "forward", lambda x, plain=block.forward: wrong(plain(x)))
        handles.append(spoilt)
        spoilt.start()
        spoilt.remove = spoilt.stop
    elif case.startswith("loss"):
        wrong = {
            "loss": boom,
            "loss float": lambda out, y: 1.0,
            "loss tuple": lambda out, y: (out.mean(), out.mean()),
            "loss integer": lambda out, y: torch.tensor(3),
            "loss detached": lambda out, y: out.mean().detach(),
            "loss per sample": lambda out, y: out.mean(dim=(1, 2)),
        }[case]
        last = engine._chunks.get(engine.plan.placement.num_stages - 1)
        plain = None if last is None else last.loss_fn
        if last is not None:
            last.loss_fn = wrong
    try:
        with torch.set_grad_enabled(not (case == "no grad" and here)):
            yield data
    finally:
        for handle in handles:
            handle.remove()
        if last is not None:
            last.loss_fn = plain


def survived(ranks, config, cases, lost, first=False, **module):
    """An engine in which a batch of each case fails, and one that is only given the batches between them.

    Args:
        lost: the pipeline rank that goes wrong.
        first: let the first batch of all be one that fails.

    Returns:
        What each case has raised here, whether all losses and weights are those of the other engine, and whether both
        evaluate alike.
    """
    engine, other = start(ranks, config, **module), start(ranks, config, **module)
    data, found, same = training.stream(engine.data_rank), {}, []

    def train_both():
        batch = list(islice(data, MICROS))
        same.append(float(engine.train_batch(iter(batch))) == float(other.train_batch(iter(batch))))

    if not first:
        train_both()
    for case in cases:
        batch, here = list(islice(data, MICROS)), engine.place.rank == lost
        run = engine.train_batch
        if case.startswith("eval "):
            run = engine.eval_batch
        if case == "nothing":
            engine.data_iterator = None
        with armed(engine, case.removeprefix("eval "), here, batch) as arriving:
            found[case] = _raised(run, *(() if case == "nothing" else (arriving,)))
        train_both()
    same += [training.digest(a) == training.digest(b) for a, b in _pairs(engine, other)]
    batch = list(islice(data, MICROS))
    same.append(float(engine.eval_batch(iter(batch))) == float(other.eval_batch(iter(batch))))
    steps = engine.global_steps, other.global_steps
    engine.destroy()
    other.destroy()
    return found, all(same), steps


def _pairs(engine, other):
    return zip(training.weights(engine).values(), training.weights(other).values(), strict=True)


def _raised(run, *arguments):
    try:
        run(*arguments)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def poisoned(ranks, config):
    """A NaN that `check_finite` finds."""
    engine, other = start(ranks, config), start(ranks, config)
    data, found = training.stream(0), []
    for step in range(3):
        batch = list(islice(data, MICROS))
        if step == 1:
            block = next(part for part in engine.module.modules() if isinstance(part, training.Block))
            hook = (
                calls(1, lambda module, inputs, output: output * torch.nan) if dist.get_rank() == 1 else lambda *_: None
            )
            handle = block.register_forward_hook(hook)
            found.append(_raised(engine.train_batch, iter(batch)))
            handle.remove()
        else:
            found.append(float(engine.train_batch(iter(batch))) == float(other.train_batch(iter(batch))))
    found.append(all(torch.equal(a, b) for a, b in _pairs(engine, other)))
    return found


def bound(ranks, config):
    """Where layers have transfers of their own the error ends the job on all ranks, and a second call says so."""
    engine, data = start(ranks, config), training.stream(0)
    engine.train_batch(data)
    engine.watch.recovers = False
    if engine.place.rank == 0:
        next(part for part in engine.module.modules() if isinstance(part, training.Block)).forward = boom
    return _raised(engine.train_batch, data), _raised(engine.train_batch, data)


def experts(config):
    """Whether batches of a model may fail whose ranks share experts."""
    import moe_runs

    import dualpipe_engine

    module = moe_runs.make_module(moe_runs.config(), 2, 2)
    return dualpipe_engine.initialize(model=module, config=config)[0].watch.recovers


def wrongly_called(config, folder):
    """What calls with wrong arguments have raised on this rank, and the losses of the steps between them."""
    engine, data = start(2, config), training.stream(0)
    calls = {
        "no micro-batch": lambda: engine.eval_batch(training.stream(0, seed=9), num_micro_batches=0),
        "micro-batches by name": lambda: engine.eval_batch(training.stream(0, seed=9), num_micro_batches="two"),
        "reduction": lambda: engine.eval_batch(training.stream(0, seed=9), reduce_output="sum"),
        "number as data": lambda: engine.train_batch(3),
        "numbers as batches": lambda: engine.train_batch(iter([(1, 2)] * MICROS)),
        "samples": lambda: engine.train_batch(iter([(torch.ones(2), torch.ones(3))] * MICROS)),
        "batch size": lambda: engine.set_train_batch_size(3),
        "no folder to save": lambda: engine.save_checkpoint(None),
        "number as folder": lambda: engine.save_checkpoint(3),
        "state": lambda: engine.save_checkpoint(folder, client_state=3),
        "unpicklable state": lambda: engine.save_checkpoint(folder, client_state={"f": lambda: 0}),
        "no folder to load": lambda: engine.load_checkpoint(None),
    }
    found, losses = {}, []
    for name, call in calls.items():
        found[name] = _raised(call)
        losses.append(float(engine.train_batch(data)))
    return found, losses


def rightly_called(config, steps):
    engine, data = start(2, config), training.stream(0)
    return [float(engine.train_batch(data)) for _ in range(steps)]
