"""Of the building blocks that keep within a cap on activations the one that is fastest when squeezed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import inf

from ..passes.squeeze import EAGER, Squeezer, Way
from ..placement import VEE, Placement
from ..plan import Plan, check_size
from ..timing.costs import UNIT, CostModel
from .blocks import HALF, Block, block, widest, widths

TRIED = 6  #: orders of each cap


class FastestBlock:
    """The fastest of what has been tried.

    Args:
        num_ranks: pipeline ranks.
        num_micro: micro-batches that are simulated.
        costs: costs of the 2 PP stages.
        split: False: full backwards only.
    """

    _plan: Plan
    _block: Block
    _cap: int
    _way: Way

    def __init__(self, num_ranks: int, num_micro: int, costs: CostModel, split: bool = True) -> None:
        self._num_ranks, self._num_micro, self._costs, self._split = num_ranks, num_micro, costs, split
        self._makespan = inf
        self._blocks: dict[int, Block] = {}
        self._half = Block((HALF,) * (num_ranks - 1))
        self._orders: dict[Block, Squeezer] = {}

    def try_cap(self, cap: int) -> None:
        """Squeeze some blocks under a cap of 2 activations or more."""
        for found, way in self._tried(cap):
            if found not in self._orders:
                self._orders[found] = Squeezer(found.plan(self._num_micro), self._costs, self._split)
            squeezed = self._orders[found].run(cap, way, self._makespan)
            if squeezed is not None and squeezed.makespan < self._makespan:
                self._plan, self._makespan = squeezed
                self._block, self._cap, self._way = found, cap, way

    def plan(self, num_micro: int) -> Plan:
        """The plan of the block that was fastest, for any number of micro-batches."""
        if num_micro == self._num_micro:
            return self._plan
        squeezed = Squeezer(self._block.plan(num_micro), self._costs, self._split).run(self._cap, self._way)
        assert squeezed is not None
        return squeezed.plan

    def _tried(self, cap: int) -> Iterator[tuple[Block, Way]]:
        """Of the blocks that hold the most activations the widest and others, and V-Half's."""
        width = widest(self._num_ranks, self._num_micro, cap)
        group = [self._at(width)]
        least, most = widths(self._num_ranks).start, group[0].peak(self._num_micro)
        while len(group) < 3 and width > least and self._at(width - 1).peak(self._num_micro) == most:
            width -= 1
            group.append(self._at(width))
        yield group[0], EAGER
        yield group[len(group) // 2], Way(theta=0.5)
        yield group[-1], Way(theta=0.5)
        yield group[-1], Way(pull=False)
        yield group[0], Way(pull=False, theta=0.5)
        if self._half.peak(self._num_micro) <= cap:
            yield self._half, Way(theta=0.5)

    def _at(self, width: int) -> Block:
        if width not in self._blocks:
            self._blocks[width] = block(self._num_ranks, width)
        return self._blocks[width]


def under(num_ranks: int, num_micro: int, cap: int, schedule: str) -> Plan:
    """The plan of the fastest block for f = i = w, chosen on a batch of at most 3 PP micro-batches.

    Raises:
        PlanError: a count is below 1.
    """
    check_size(Placement(VEE, num_ranks), num_micro)
    search = FastestBlock(num_ranks, min(num_micro, 3 * num_ranks), UNIT)
    search.try_cap(cap)
    return replace(search.plan(num_micro), schedule=schedule)
