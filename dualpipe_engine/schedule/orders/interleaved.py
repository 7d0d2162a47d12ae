"""Interleaved 1F1B: several stages a rank, in rounds of PP micro-batches (arXiv 2104.04473, section 2.2).

The first stages of all ranks follow each other, then their second ones, and so on, so that each hop of the way is a
part of a stage's time long and the bubble a part of 1F1B's: (PP-1)(F+B)/v with v stages a rank. A round of PP
micro-batches goes through all stages before the next one starts: the first rank turns to its next stage just when the
first micro-batch of the round comes back from the last rank.

The forwards of rank 0 of 2 with 2 stages and 4 micro-batches: stages 0 and 2, rounds of micro-batches 0 1 and 2 3

    0F0 0F1 2F0 2F1 | 0F2 0F3 2F2 2F3
"""

from __future__ import annotations

from collections.abc import Sequence

from ..op import B, F, Op
from ..placement import LOOP, Placement
from ..plan import Plan, check_size

STAGES = 2  #: a rank, where nothing else is said


def cap(num_ranks: int, stages_per_rank: int = STAGES) -> int:
    """Activations that a rank holds at most."""
    return stages_per_rank * num_ranks + (num_ranks - 1 if stages_per_rank > 1 else 0)


def generate(num_ranks: int, num_micro: int, stages_per_rank: int = STAGES) -> Plan:
    """Rank r runs ahead of its backwards by all stages but the last of one round, and by 2 (PP-1-r) forwards more: a
    micro-batch may take a forward and a backward of time for each hop, so that transfers are hidden.

    A round that is not full has its missing micro-batches left out, which leaves idle time. One stage a rank is 1F1B.

    Args:
        num_ranks: pipeline ranks, any number; rank r runs stages r, PP+r, 2 PP+r, ...
        num_micro: micro-batches of the batch, any number; without idle time in the middle where PP divides it.
        stages_per_rank: stages of a rank.

    Raises:
        PlanError: a count is below 1.
    """
    placement = Placement(LOOP, num_ranks, stages_per_rank)
    check_size(placement, num_micro)
    programs = []
    for rank in range(num_ranks):
        stages = placement.stages_of(rank)
        forwards = _rounds(F, stages, num_ranks, num_micro)
        backwards = _rounds(B, stages[::-1], num_ranks, num_micro)
        hop = 2 if stages_per_rank > 1 else 1
        ahead = min((stages_per_rank - 1) * num_ranks + hop * (num_ranks - 1 - rank), len(forwards))
        order = forwards[:ahead]
        for forward, backward in zip([*forwards[ahead:], *[None] * ahead], backwards, strict=True):
            order += (forward, backward)
        programs.append(tuple(op for op in order if op is not None))
    return Plan(placement, num_micro, tuple(programs), "interleaved")


def _rounds(kind: str, stages: Sequence[int], num_ranks: int, num_micro: int) -> list[Op | None]:
    """All ops of a kind round by round, each round stage by stage; None for micro-batches that do not exist."""
    return [
        Op(kind, stage, micro) if micro < num_micro else None
        for first in range(0, num_micro, num_ranks)
        for stage in stages
        for micro in range(first, first + num_ranks)
    ]
