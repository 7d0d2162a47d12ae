"""What a stage refuses: losses that are none, and outputs from which nothing would be trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dualpipe_engine.errors import ConfigError
from dualpipe_engine.runtime.chunk import StageChunk

mse = nn.functional.mse_loss


@pytest.mark.parametrize(
    ("loss_fn", "text"),
    [
        (lambda y, t: (mse(y, t), {}), "a tuple"),
        (lambda y, t: [mse(y, t)], "a list"),
        (lambda y, t: {"loss": mse(y, t)}, "a dict"),
        (lambda y, t: float(mse(y, t).detach()), "a float"),
        (lambda y, t: np.asarray(mse(y, t).detach()), "a ndarray"),
        (lambda y, t: (y - t).square().mean(-1), r"a tensor \[3\] of torch.float32"),
        (lambda y, t: mse(y, t).detach(), "a tensor that needs no gradient"),
        (lambda y, t: y.argmax().int(), r"a tensor \[\] of torch.int32"),
    ],
)
def test_a_loss_that_is_none(loss_fn, text):
    chunk = StageChunk(nn.Linear(2, 2), 1, is_last=True, loss_fn=loss_fn)
    with pytest.raises(ConfigError, match=f"what loss_fn returns is {text} in micro-batch 3"):
        chunk.forward(3, torch.randn(3, 2), torch.randn(3, 2))
    chunk = StageChunk(lambda x: loss_fn(x, torch.zeros(3, 2)), 1, is_last=True)
    with pytest.raises(
        ConfigError, match=f"the output of the last layer, which is the loss, is {text} in micro-batch 3"
    ):
        chunk.forward(3, torch.randn(3, 2).requires_grad_())


def test_a_loss_of_one_element():
    chunk = StageChunk(nn.Linear(2, 2), 1, is_last=True, loss_fn=lambda y, t: mse(y, t).reshape(1))
    assert chunk.forward(0, torch.randn(3, 2), torch.randn(3, 2)).shape == (1,)


@pytest.mark.parametrize(("output", "kind"), [(None, "NoneType"), (3.0, "float"), ((), "tuple"), ({"x": None}, "dict")])
def test_an_output_without_a_tensor(output, kind):
    chunk = StageChunk(lambda x: output, 1, is_last=False)
    with pytest.raises(ConfigError, match=f"stage 1 holds no tensor in micro-batch 2, but is of type {kind}: its last"):
        chunk.forward(2, torch.randn(3, 2))


def test_an_output_from_which_nothing_would_be_trained():
    layer = nn.Linear(2, 2)
    chunk = StageChunk(lambda x: layer(x).detach(), 0, is_last=False, params=layer.parameters())
    with pytest.raises(ConfigError, match="the output of stage 0 needs no gradient in micro-batch 2"):
        chunk.forward(2, torch.randn(3, 2))
    layer.requires_grad_(False)
    assert chunk.forward(2, torch.randn(3, 2)).shape == (3, 2)
