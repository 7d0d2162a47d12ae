"""Choose the reduction that fits the optimizer: the list of reductions."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from .after_schedule import AfterSchedule
from .all_reduce import AllReduce
from .interface import Reduction
from .partitioned import PartitionedReduction


def choose_reduction(engine: Any) -> Reduction:
    """The reduction that fits the engine's optimizer."""
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    if "muon" in type(inner).__name__.lower():
        return AfterSchedule(engine)
    if type(optimizer) is DeepSpeedZeroOptimizer:
        return PartitionedReduction(engine)
    sparse = any(getattr(part, "sparse", False) for part in engine.module.modules())  # nn.Embedding, nn.EmbeddingBag
    return AfterSchedule(engine) if sparse else AllReduce(engine)
