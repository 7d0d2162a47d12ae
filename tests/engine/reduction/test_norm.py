"""Sums of squares and buckets: a part at a time, with the values of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dualpipe_engine.engine.reduction import all_reduce, norm


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(7, 300),
        lambda: torch.randn(300, 7).t(),
        lambda: torch.randn(4, 30, 7).permute(2, 0, 1),
        lambda: torch.randn(40, 60)[::2, 1:50],
        lambda: torch.randn(2100, dtype=torch.bfloat16),
        lambda: torch.randn(50, 4).relu().to_sparse(),
    ],
    ids=["plain", "transposed", "permuted", "slice", "bf16", "sparse"],
)
def test_squares_in_pieces(make, monkeypatch):
    torch.manual_seed(1)
    grad = make()
    want = grad.to_dense().double().pow(2).sum()
    assert torch.equal(norm.sum_of_squares(grad), grad.double().square().sum())
    monkeypatch.setattr(norm, "PIECE", 64)
    found = norm.sum_of_squares(grad)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, want, rtol=1e-14, atol=0)


def test_no_float64_copy_of_a_whole_gradient(monkeypatch):
    monkeypatch.setattr(norm, "PIECE", 64)
    sizes = []
    double = torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda tensor: sizes.append(tensor.numel()) or double(tensor))
    norm.sum_of_squares(torch.randn(1000))
    assert max(sizes) == 64


def test_buckets_hold_no_whole_stage(monkeypatch):
    monkeypatch.setattr(all_reduce, "BUCKET", 100)
    params = [nn.Parameter(torch.zeros(size)) for size in (40, 60, 1, 250, 30, 30, 30, 30)]
    found = [[param.numel() for param in bucket] for bucket in all_reduce.buckets(params)]
    assert found == [[40, 60], [1], [250], [30, 30, 30], [30]]


def test_a_flat_buffer_gives_up_what_it_has_copied():
    grads = [torch.arange(6.0).view(2, 3).t(), torch.arange(4.0)]
    flat = all_reduce._flat(grads, torch.float64)
    assert not grads and flat.dtype == torch.float64
    assert flat.tolist() == [0, 3, 1, 4, 2, 5, 0, 1, 2, 3]
    single = torch.arange(4.0).view(2, 2)
    assert all_reduce._flat([single], torch.float32).data_ptr() == single.data_ptr()
    assert all_reduce._flat([single.t()], torch.float32).tolist() == [0, 2, 1, 3]
