"""Sums of squares of gradients, for the global norm."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 1 << 22  #: elements that are looked at in float64 at a time (32 MiB)


def norm_of(grad: Tensor) -> Tensor:
    """2-norm, of a sum in float64 without a copy of the whole (scalar float64); not read back."""
    return grad.double().norm(2) if grad.numel() <= PIECE else sum_of_squares(grad).sqrt()


def sum_of_squares(grad: Tensor) -> Tensor:
    """Of all elements, added up in float64 without a copy of the whole (scalar float64); not read back."""
    grad = grad.detach()
    if grad.layout != torch.strided or grad.numel() <= PIECE:
        return grad.double().square().sum()
    if not grad.is_contiguous():  # a transposed weight's, as a rule
        grad = grad.permute(sorted(range(grad.dim()), key=grad.stride, reverse=True))
    total = torch.zeros((), dtype=torch.float64, device=grad.device)
    for piece in grad.reshape(-1).split(PIECE):
        total += piece.double().square().sum()
    return total
