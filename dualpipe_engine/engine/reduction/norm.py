"""Sums of squares of gradients, for the global norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import groups
from torch import Tensor, nn

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


def sum_over_experts(square: Tensor, params: Sequence[nn.Parameter]) -> None:
    """Add to `square` (scalar) the squared gradients of experts, those of the ranks that share them included."""
    names = sorted({_experts_of(param) for param in params if is_moe_param(param)})
    for name in names:
        of_group = square.new_zeros(())
        for param in params:
            if param.grad is not None and is_moe_param(param) and _experts_of(param) == name:
                of_group += sum_of_squares(param.grad)
        dist.all_reduce(of_group, group=groups._get_expert_parallel_group(name))
        square += of_group


def _experts_of(param: nn.Parameter) -> str:
    return str(param.group_name)  # type: ignore[attr-defined]  # hung there by DeepSpeed
