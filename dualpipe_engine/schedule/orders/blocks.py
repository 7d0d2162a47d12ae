"""Building blocks on the vee placement: where F and I of one micro-batch stand in time, repeated at a fixed distance.

How many activations a rank holds follows from how far the ops of a micro-batch lie apart (arXiv 2405.15362, section 2):
an activation lives from its F to its I, and a new micro-batch comes every `PERIOD` time steps, one for each F, I and W
of the rank's two stages. So each step by which a hop from rank to rank takes longer costs memory, and the four ops of a
rank must fall on different steps of the period. V-Min's hops take one step each, ZB-V's four on the way from the first
rank and two on the way back:

| hops | steps of the four ops | activations of a rank |
|---|---|---|
| NARROW | 1 1 1 1 | 2/3 PP (V-Min) |
| HALF | 2 1 2 1 | PP (V-Half) |
| MIDDLE | 2 2 2 2 | 4/3 PP |
| WIDE | 4 2 4 2 | 2 PP (ZB-V) |

Each of them lengthens both stages of a rank alike, so blocks whose hops are of several kinds are balanced too: any
number of activations between V-Min's and ZB-V's has a block. Fewer than V-Min's have V-Min's hops at a longer period.

V-Min's block on 3 ranks, a column a time step; f, i are the ops of the rank's first stage, F, I those of its second:

    rank 0  f         F     I         i
    rank 1    f     F         I     i
    rank 2      f F             I i
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from ..op import F, I, Op
from ..placement import VEE, Placement
from ..plan import Plan

PERIOD = 6

Hop = tuple[int, int, int, int]
NARROW, HALF, MIDDLE, WIDE = (1, 1, 1, 1), (2, 1, 2, 1), (2, 2, 2, 2), (4, 2, 4, 2)


class Block:
    """Times of F and I of micro-batch 0: `times[rank]` are those of F and I of its first stage, F and I of its second,
    in the order F, F, I, I of the way.

    Args:
        hops: steps from rank r to rank r + 1, of F there, F back, I there and I back.
        period: steps from one micro-batch to the next.

    Raises:
        ValueError: two ops of a rank fall on the same step of the period, wherever the way turns round.
    """

    def __init__(self, hops: tuple[Hop, ...], period: int = PERIOD) -> None:
        self.period = period
        at = [(0, 0, 0, 0)]
        for there, back, out, home in hops:
            f, g, i, j = at[-1]
            at.append((f + there, g - back, i + out, j - home))
        last = at[-1]
        for turns in _turns(period):
            # The second F of the last rank follows its first, and so on round the way.
            back = last[0] + 1 + turns[0] - last[1]
            out = back + 1 + turns[1]
            home = out + last[2] + 1 + turns[2] - last[3]
            times = [(f, g + back, i + out, j + home) for f, g, i, j in at]
            if all(len({step % period for step in row}) == 4 for row in times):
                self.times = times
                return
        raise ValueError(f"no block of period {period} has the hops {hops}")

    def peak(self, num_micro: int) -> int:
        """Most activations between F and I that a rank holds."""
        most = 0
        for first, second, out, home in self.times:
            for now in (first, second):
                alive = 0
                for start, end in ((first, home), (second, out)):
                    # Those of micro-batch m live from start + m * period to end + m * period.
                    alive += min((now - start) // self.period - (now - end) // self.period, num_micro)
                most = max(most, alive)
        return most

    def plan(self, num_micro: int) -> Plan:
        """The ops F and I of every rank in the order of the block's steps, without any W."""
        placement = Placement(VEE, len(self.times))
        programs = []
        for rank, row in enumerate(self.times):
            here, there = placement.stages_of(rank)
            kinds = ((F, here), (F, there), (I, there), (I, here))
            order = sorted((step + self.period * m, way, m) for way, step in enumerate(row) for m in range(num_micro))
            programs.append(tuple(Op(*kinds[way], micro) for _, way, micro in order))
        return Plan(placement, num_micro, tuple(programs))


def widths(num_ranks: int) -> range:
    """What `block` takes: from one micro-batch at a time over V-Min's block (0) to that of ZB-V."""
    hops = num_ranks - 1
    return range(-2 * hops, 2 * hops + 1)


def block(num_ranks: int, width: int) -> Block:
    """The block of a width; of two the wider one holds as many activations or more."""
    hops = num_ranks - 1
    if width < 0:
        return Block((NARROW,) * hops, PERIOD - 2 * width)  # of odd periods not all have a block
    if width <= hops:
        return Block((MIDDLE,) * width + (NARROW,) * (hops - width))
    return Block((WIDE,) * (width - hops) + (MIDDLE,) * (2 * hops - width))


def widest(num_ranks: int, num_micro: int, cap: int) -> int:
    """The largest width whose block holds at most `cap` activations between F and I; `cap` is 2 or more."""
    every = widths(num_ranks)
    return every[bisect_right(every, cap, key=lambda width: block(num_ranks, width).peak(num_micro)) - 1]


def _turns(period: int) -> Iterator[tuple[int, int, int]]:
    """Steps that the three turns of the way may take beyond one, the shortest sums first."""
    for total in range(3 * period):
        for first in range(min(total, period - 1) + 1):
            for second in range(min(total - first, period - 1) + 1):
                if total - first - second < period:
                    yield first, second, total - first - second
