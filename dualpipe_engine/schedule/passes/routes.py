"""Routes: between which ranks the tensors of a plan's ops travel."""

from __future__ import annotations

from typing import NamedTuple

from ..op import RECEIVES, SENDS, Op
from ..placement import Placement


class Ends(NamedTuple):
    """Of an op that passes a tensor on or takes one.

    Args:
        home: the rank that runs its stage; None: the stage or the micro-batch is none of the plan's.
        target: the other rank that what it makes, or sends, goes to; None: there is none.
        source: the other rank that what it takes, or receives, comes from.
    """

    home: int | None
    target: int | None
    source: int | None


class Routes:
    """The ends of ops, worked out once for each kind, stage and direction of micro-batches."""

    def __init__(self, placement: Placement, num_micro: int) -> None:
        self._placement, self._num_micro = placement, num_micro
        self._stages = range(placement.num_stages)
        self._known: dict[tuple[str, int, int], Ends] = {}

    def ends(self, op: Op) -> Ends:
        """Of an F, B, I or transfer."""
        kind, stage, micro, _ = op
        if not 0 <= micro < self._num_micro:
            return Ends(None, None, None)
        key = kind, stage, self._placement.direction(micro)
        found = self._known.get(key)
        if found is None:
            sends = op if kind in SENDS else None if kind in RECEIVES else op.send()
            receives = op if kind in RECEIVES else None if kind in SENDS else op.receive()
            home = self._placement.rank_of(stage, micro) if stage in self._stages else None
            found = self._known[key] = Ends(home, self._peer(home, sends), self._peer(home, receives))
        return found

    def _peer(self, home: int | None, transfer: Op | None) -> int | None:
        if transfer is None or home is None or (other := transfer.other_end()).stage not in self._stages:
            return None
        peer = self._placement.rank_of(other.stage, other.micro)
        return None if peer == home else peer
