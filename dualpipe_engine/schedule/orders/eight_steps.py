"""The eight steps of DualPipe (DeepSeek-V3 report, section 3.2.1) for one rank, on any two phases.

DualPipe and DualPipeV run the same steps. A rank at distance `h` from the outer end works on two phases: phase 0 is
the one that enters at the end nearest to the rank, phase 1 the one that comes back from the far end. DualPipe on PP
ranks has `half = PP/2` such distances and its phases are the two directions; DualPipeV on PP ranks has `half = PP` and
its phases are the two stages of the rank.

The outermost rank (`h` = 0) of DualPipe on 4 ranks (`half` = 2, so `outer` = 1) with 10 micro-batches, 5 of each
phase. Each op with its phase, the steps as they are numbered in the code, time to the right:

    1       2       3          4                           5             6       7       8
    F0 F0 | F0 F1 | I1 W F1 | (F0;B1) (F1;B0), 2 rounds | B1 (F1;B0) | B1 I0 | W I0 | W
    ------ warm-up ---------  ------ steady state ------  ------------ cool-down ----------

A W takes the oldest gradient that waits. For the next `h` step 1 is two forwards shorter, and step 2 as many longer.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..op import FB, B, F, I, Op, W
from .emitter import Emitter


def eight_steps(half: int, h: int, stages: Sequence[int], micros: Sequence[Sequence[int]]) -> tuple[Op, ...]:
    """The program of one rank.

    The steps need at least `2 half - 1` micro-batches a phase. With fewer, the steps are laid out for that many and the
    ops of those that do not exist are left out; leaving nodes out of an acyclic graph keeps it acyclic. The same
    covers phases of different length.

    Args:
        half: number of distances, see the module.
        h: distance of the rank from the outer end, `0 <= h < half`.
        stages: the stage that the rank runs in phase 0 and in phase 1.
        micros: the micro-batches of phase 0 and of phase 1, in order.
    """
    rank = Emitter(stages, micros)
    n = max(len(micros[0]), len(micros[1]), 2 * half - 1)
    outer = half - h - 1
    rank.repeat(2 * outer, (F, 0))  # 1
    rank.repeat(h + 1, (F, 0), (F, 1))  # 2
    rank.repeat(outer, (I, 1), (W, 0), (F, 1))  # 3: zero bubble
    steady = n - 2 * outer - (h + 1)
    if outer == 0 and steady:  # 4: in the middle the first pair would delay its neighbour
        rank.repeat(1, (F, 0), (B, 1), (FB, 1))
        steady -= 1
    rank.repeat(steady, (FB, 0), (FB, 1))  # 4: steady state
    rank.repeat(outer, (B, 1), (FB, 1))  # 5
    # 6: h + 1 rounds of B1, B0; the last h + 1 of these backwards leave their W for steps 7 and 8.
    whole = [(B, 1), (B, 0)] * (h + 1)
    rank.repeat(1, *whole[: h + 1], *((I, phase) for _, phase in whole[h + 1 :]))
    rank.repeat(outer, (W, 0), (I, 0))  # 7
    rank.repeat(h + 1, (W, 0))  # 8
    return tuple(rank.ops)
