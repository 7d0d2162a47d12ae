"""Choose the reduction that fits the optimizer: the list of reductions."""

from __future__ import annotations

from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ..context import Context
from .after_schedule import AfterSchedule
from .all_reduce import AllReduce
from .freezing import TrainedParams
from .interface import Reduction
from .partitioned import PartitionedReduction


def choose_reduction(context: Context, trained: TrainedParams) -> Reduction:
    """The reduction that fits the optimizer of an engine.

    Args:
        context: of the engine.
        trained: which parameters are.
    """
    optimizer = context.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    if "muon" in type(inner).__name__.lower():
        return AfterSchedule(context, trained)
    if type(optimizer) is DeepSpeedZeroOptimizer:
        return PartitionedReduction(context, trained)
    sparse = any(getattr(part, "sparse", False) for part in context.module.modules())  # nn.Embedding, nn.EmbeddingBag
    return AfterSchedule(context, trained) if sparse else AllReduce(context, trained)
