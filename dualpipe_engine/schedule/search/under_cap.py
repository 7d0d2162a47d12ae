"""The fastest plan of the vee placement under a cap on activations: a dial from one micro-batch at a time to ZB-V."""

from __future__ import annotations

from ..orders.fastest_block import TRIED, FastestBlock
from ..plan import Plan
from ..timing.costs import CostModel

LEAST_CAP = 2  #: activations of one micro-batch on both stages of a rank
MOST_OPS = 1_500_000  #: of all orders that are tried


def under_cap(num_ranks: int, num_micro: int, costs: CostModel, cap: int, split: bool = True) -> Plan:
    """The fastest of some building blocks, squeezed, whose activations keep within a cap.

    Those of all smaller caps are among them, so that a larger cap never gives a longer makespan. Where these would be
    more than `MOST_OPS` ops, the choice is made on fewer micro-batches, and among the largest caps.

    Args:
        num_ranks: pipeline ranks.
        num_micro: micro-batches of the batch.
        costs: costs of the 2 PP stages.
        cap: activations (stage, micro-batch) that a rank may hold, at least `LEAST_CAP`.
        split: False: full backwards only.
    """
    caps = range(min(cap, 2 * num_ranks), LEAST_CAP - 1, -1)
    ops = 6 * num_ranks * TRIED  # of each cap and micro-batch
    trial = num_micro if ops * num_micro * len(caps) <= MOST_OPS else min(num_micro, 3 * num_ranks)
    search = FastestBlock(num_ranks, trial, costs, split)
    for each in caps[: max(1, MOST_OPS // (ops * trial))]:
        search.try_cap(each)
    return search.plan(num_micro)
