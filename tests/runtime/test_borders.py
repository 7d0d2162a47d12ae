"""Notes about what passes the borders of stages."""

from __future__ import annotations

import math

import pytest
import torch

from dualpipe_engine.runtime.borders import BACKWARD, FORWARD, Borders, origins

CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf


def told(borders):
    return [(each.micro, each.stage, each.direction, each.text) for each in origins(borders.findings())]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [NAN, INF, -INF, 3.0])
def test_values(dtype, value):
    borders = Borders()
    tensor = torch.tensor([1.0, value, -2.0], dtype=dtype)
    borders.output(0, 1, (tensor, {"mask": torch.ones(2, dtype=torch.bool)}, torch.arange(2), None))
    borders.output(0, 2, tensor.new_empty(0))
    bad = math.isnan(value) or value == INF  # -inf is what masks hold
    assert float(borders.bad(CPU)) == bad
    assert [each[:3] for each in told(borders)] == [(1, 0, FORWARD)] * bad
    borders.clear()
    borders.back(2, 1, [tensor, tensor.new_zeros(3)])
    borders.loss(3, 2, tensor[1])
    bad = not math.isfinite(value)
    assert float(borders.bad(CPU)) == 2 * bad
    assert [each[:3] for each in told(borders)] == [(1, 2, BACKWARD), (2, 3, FORWARD)] * bad


def test_the_origin_is_the_first_on_the_way():
    borders, nan = Borders(), torch.tensor([NAN])
    borders.back(0, 4, [nan])
    borders.back(1, 4, [nan])
    borders.loss(2, 5, nan[0])
    borders.output(1, 5, nan)
    borders.back(1, 5, [nan])
    borders.data(6, nan)
    borders.output(0, 6, nan)
    assert told(borders) == [
        (4, 1, BACKWARD, "NaN in the gradient of the stage's input"),
        (5, 1, FORWARD, "NaN in the output of the stage"),
        (6, 0, FORWARD, "NaN in the data"),
    ]


def test_a_sum_of_weight_gradients_is_blamed_on_who_spoilt_it():
    param = torch.zeros(2, requires_grad=True)
    borders = Borders(params={1: [param]})
    param.grad = torch.zeros(2)
    borders.weights(1, 0)
    param.grad[0] = INF
    borders.weights(1, 2)
    borders.weights(1, 4)
    assert told(borders) == [(2, 1, BACKWARD, "inf in a weight gradient of the stage")]


def test_gradients_are_left_to_a_loss_scaler():
    param = torch.zeros(1, requires_grad=True)
    param.grad = torch.tensor([INF])
    borders = Borders(gradients=False, params={0: [param]})
    borders.back(0, 0, [param.grad])
    borders.weights(0, 0)
    assert float(borders.bad(CPU)) == 0
    borders.loss(0, 0, torch.tensor(NAN))
    assert float(borders.bad(CPU)) == 1


def test_complex_and_sparse_gradients():
    param = torch.zeros(3, 2, requires_grad=True)
    borders = Borders(params={0: [param]})
    borders.back(0, 1, [torch.tensor([1 + 2j, complex(0, -INF)]).conj()])
    param.grad = torch.sparse_coo_tensor([[1]], torch.tensor([[1.0, NAN]]), (3, 2), check_invariants=True)
    borders.weights(0, 2)
    assert [each[:3] for each in told(borders)] == [(1, 0, BACKWARD), (2, 0, BACKWARD)]
