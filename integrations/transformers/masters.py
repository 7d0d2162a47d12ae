"""Weights in fp32 of a model that trains in bf16 or fp16.

A Trainer keeps the weights that it was given and computes in another precision; DeepSpeed casts the weights, and its
optimizer keeps them in fp32, each replica a part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from deepspeed.utils import safe_get_full_fp32_param

if TYPE_CHECKING:
    from dualpipe_engine.engine.engine import DualPipeEngine


@contextmanager
def masters(engine: DualPipeEngine) -> Iterator[None]:
    """Within, parameters that the optimizer keeps in fp32 are those, on the host but for shared experts. Collective.

    Args:
        engine: with ZeRO-1 or ZeRO-2, or bf16; without, and in fp32, parameters stay as they are.
    """
    optimizer, low = engine.optimizer, []
    engine.masters.follow(optimizer)
    groups = getattr(optimizer, "bf16_groups", None) or getattr(optimizer, "bit16_groups", None) or []
    try:
        for param in (param for group in groups for param in group if param.dtype in (torch.bfloat16, torch.float16)):
            whole = safe_get_full_fp32_param(param)  # a collective of the replicas of this parameter
            if whole is not None:
                low.append((param, param.data))
                param.data = whole.detach() if getattr(param, "allreduce", True) is False else whole.detach().cpu()
        yield
    finally:
        for param, data in low:
            param.data = data
