"""How much of the measured communication ran under something else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..schedule.timeline import Hop
from .chrome import COMM_TRACK, Note


@dataclass
class Hidden:
    """Transfers of one name, over all ranks.

    Args:
        name: of the phase that posted them, or "send" and "recv" between stages.
        count: transfers.
        size: bytes sent.
        seconds: from posting to the end, summed.
        waited: seconds that ranks stood still for them, summed.
    """

    name: str
    count: int = 0
    size: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    @property
    def share(self) -> float:
        """Hidden part of `seconds`, 0 to 1."""
        return max(0.0, 1.0 - self.waited / self.seconds) if self.seconds > 0 else 1.0

    def __str__(self) -> str:
        amount = f"{self.waited * 1e3:.0f} ms waited ({self.count} transfers, {self.size / 2**20:.1f} MiB)"
        return f"{self.share:.1%} of {self.seconds * 1e3:.0f} ms hidden, {amount}" if self.share else amount


def hidden(transfers: Sequence[Hop]) -> list[Hidden]:
    """Add up transfers by name, in the order of their first appearance."""
    found: dict[str, Hidden] = {}
    for hop in transfers:
        each = found.setdefault(hop.name, Hidden(hop.name))
        each.count += 1
        each.size += hop.size
        each.seconds += hop.end - hop.start
        each.waited += min(hop.waited, hop.end - hop.start)
    return list(found.values())


def notes(transfers: Sequence[Hop]) -> list[Note]:
    """Transfers as tracks of a trace."""
    return [
        Note(hop.rank, COMM_TRACK, hop.name, "transfer", hop.start, hop.end, {"waited": hop.waited, "bytes": hop.size})
        for hop in transfers
    ]
