"""The same training by `train_batch`, and by batches whose step is a call of its own."""

from __future__ import annotations

import contextlib
from itertools import islice

import torch
from training import make_module, settings, stream, weights

CASES = {"plain": {"zero": 0}, "zero": {"zero": 1}, "bf16": {"zero": 1, "precision": "bf16"}, "fp16": {"zero": 0}}
CASES["fp16"]["precision"] = "fp16"


def train(how, zero, precision="fp32", schedule="dualpipe"):
    """Two steps of four micro-batches: of one batch, or of two whose gradients are added up."""
    import dualpipe_engine

    micros = 4 if how == "whole" else 2
    config = settings(micros, zero=zero, precision=precision, schedule=schedule)
    engine, *_ = dualpipe_engine.initialize(model=make_module(2, 4), config=config)
    data, losses = stream(0), []
    for _ in range(2):
        if how == "whole":
            losses.append(float(engine.train_batch(data)))
            continue
        parts = []
        for number in range(2):
            last = how == "told" and number == 1
            parts.append(float(engine.forward_backward(data, batches=2, last=last)))
        engine.take_step()
        losses.append(sum(parts) / 2)
    return losses, float(engine.get_global_grad_norm()), weights(engine), engine.global_steps


def all_cases(schedule="dualpipe"):
    return {
        (name, how): train(how, schedule=schedule, **case)
        for name, case in CASES.items()
        for how in ("whole", "told", "late")
    }


def refusals():
    """What each order of calls is answered with, and what is trained after it."""
    import dualpipe_engine

    engine, *_ = dualpipe_engine.initialize(model=make_module(2, 4), config=settings(2, zero=0, schedule="dualpipe"))
    data, said = stream(0), []

    def tell(call):
        try:
            call()
        except dualpipe_engine.ConfigError as error:
            said.append(str(error))

    before = weights(engine)
    tell(engine.take_step)
    engine.forward_backward(data, batches=2, last=False)
    tell(lambda: engine.train_batch(data))  # drops what has waited
    with contextlib.suppress(StopIteration):
        engine.forward_backward(data, batches=2, last=False)
        engine.forward_backward(iter(list(islice(data, 1))), batches=2)
    tell(engine.take_step)
    engine.forward_backward(data)
    engine.drop_gradients()
    tell(engine.take_step)
    engine.forward_backward(data)
    engine.zero_grad()
    tell(engine.take_step)
    same = all(torch.equal(before[name], value) for name, value in weights(engine).items())
    twos, *_ = dualpipe_engine.initialize(model=make_module(2, 4), config=settings(2, zero=2, schedule="dualpipe"))
    tell(lambda: twos.forward_backward(data, batches=2, last=False))
    twos.forward_backward(data)
    twos.zero_grad()
    tell(twos.take_step)
    twos.forward_backward(data)
    twos.take_step()
    return said, same, twos.global_steps
