"""DeepSpeed's own DualPipeV, by our initialize, beside ours."""

from __future__ import annotations

import contextlib
import io

import torch
from deepspeed.pipe import DualPipeVModule, LayerSpec, PipelineModule

import dualpipe_engine

WIDTH, MICROS = 8, 4


class Layer(torch.nn.Module):
    """x `[rows, WIDTH]` -> the same shape; weights by the number of the layer."""

    def __init__(self, number):
        super().__init__()
        torch.manual_seed(number)
        self.linear = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.tanh(self.linear(x))


def made(kind, micros=MICROS, zero=0, dynamic_shape=False, **pipeline):
    config = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": micros, "steps_per_print": None,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}}, "pipeline": pipeline,
        "zero_optimization": {"stage": zero},
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        module = kind(
            [LayerSpec(Layer, number) for number in range(4)], num_stages=2, loss_fn=torch.nn.functional.mse_loss,
            partition_method="uniform", dynamic_shape=dynamic_shape,
        )  # fmt: skip
        engine, *_ = dualpipe_engine.initialize(model=module, config=config)
    return engine


def data():
    generator = torch.Generator().manual_seed(1)
    while True:
        yield tuple(torch.randn(2, WIDTH, generator=generator) for _ in range(2))


def trained(kind, micros=MICROS, **options):
    engine = made(kind, micros, **options)
    batches = data()
    losses = [float(engine.train_batch(batches)) for _ in range(3)]
    name = type(engine).__name__
    engine.destroy()
    return name, losses


def both():
    return trained(DualPipeVModule), trained(PipelineModule, schedule="dualpipev")


#: What DeepSpeed 0.19.8 refuses, which ours runs.
LIMITS = {"micro-batches": {"micros": 3}, "dynamic_shape": {"dynamic_shape": True}, "zero": {"zero": 2}}


def limits():
    """What DeepSpeed says to each limit, and the last loss of ours."""
    found = {}
    for name, options in LIMITS.items():
        try:
            made(DualPipeVModule, **options)
            said = ""
        except AssertionError as error:
            said = str(error)
        found[name] = said, trained(PipelineModule, schedule="dualpipev", **options)[1][-1]
    return found
