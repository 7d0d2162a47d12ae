"""A pipeline in which one micro-batch of the second batch goes wrong at one place."""

from __future__ import annotations

import logging

import torch
import training
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import nn

MICROS, BAD = 8, 5 + 8  # micro-batch 5 of the second batch
WIDTH = 8


class Spoil(torch.autograd.Function):
    """Identity whose backward is infinite."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, torch.inf)


class Layer(nn.Module):
    """Takes and passes on (x, mask, number of the micro-batch); the mask holds -inf, as masks do."""

    def __init__(self, poison=None):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.poison = poison

    def forward(self, value):
        x, mask, number = value
        poison = self.poison if int(number) == BAD else None
        if poison == "forward":
            x = x * torch.nan
        if poison == "backward":
            x = Spoil.apply(x)
        weight = Spoil.apply(self.linear.weight) if poison == "weight" else self.linear.weight
        x = x + torch.tanh(nn.functional.linear(x, weight, self.linear.bias))
        return x, mask, number


def loss_fn(output, labels):
    x, mask, number = output
    factor = torch.nan if labels is not None and int(number) == BAD and int(labels[0, 0]) else 1.0
    return (x.float() * mask.float().exp()[:, :1]).pow(2).mean() * factor


def stream(poison, dtype, replica):
    generator = torch.Generator().manual_seed(5 + replica)
    number = 0
    while True:
        x = torch.randn(2, WIDTH, generator=generator).to(dtype)
        bad = number == BAD and replica == 0
        if bad and poison == "data":
            x[1, 3] = torch.inf
        mask = torch.tensor([[0.0, -torch.inf]] * 2, dtype=dtype)
        label = torch.full((2, 1), int(bad and poison == "loss"))
        yield (x, mask, torch.tensor(number if bad or number != BAD else 0)), label
        number += 1


def poisoned(poison, schedule="dualpipe", ranks=4, zero=1, precision="fp32", clip=1.0, **pipeline):
    """Two batches; what this rank logged and raised, and whether the second has left weights alone."""
    import dualpipe_engine
    from dualpipe_engine.errors import DualPipeError

    torch.manual_seed(7)
    replicas = 4 // ranks
    layers = [Layer(poison if index == 2 else None) for index in range(8)]
    topology = PipeDataParallelTopology(ranks, replicas)
    module = PipelineModule(layers, topology=topology, loss_fn=loss_fn, partition_method="uniform")
    config = training.settings(MICROS, replicas, zero, precision, schedule, clip, **pipeline)
    del config["scheduler"]  # whose first steps change nothing
    engine, *_ = dualpipe_engine.initialize(model=module, config=config)
    data = stream(
        poison, {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32), engine.data_rank
    )
    engine.train_batch(data)
    before = {name: training.digest(value) for name, value in training.weights(engine).items()}
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("DeepSpeed").addHandler(handler)
    error = None
    try:
        engine.train_batch(data)
    except DualPipeError as caught:
        error = (type(caught).__name__, str(caught))
    finally:
        logging.getLogger("DeepSpeed").removeHandler(handler)
    after = {name: training.digest(value) for name, value in training.weights(engine).items()}
    messages = [text for text in messages if "OVERFLOW!" not in text]  # DeepSpeed's own
    found = {"warnings": messages, "error": error, "kept": before == after, "skipped": engine.skipped_steps}
    engine.destroy()
    return found
