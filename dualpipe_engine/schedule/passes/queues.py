"""Whether ranks can make their transfers with few hardware queues, and without tags.

What the host of a rank does to its streams is a row of events, by the rules of `comm/p2p.py`: one receive of each edge
is posted ahead, as soon as the one before it has been taken; a send starts behind the op that makes its message. In the
first step a header goes before the first forward message of a stage, and the message itself is posted when it is
needed. The two ends of a transfer join when both have started it. A device holds back

- a transfer, and all events behind it, while the one before it on its edge is not joined, as they share a stream, and
  all streams may share a hardware queue;
- one that starts while as many of the rank's others are not joined as there are hardware queues, each of which one of
  these may keep.

An event that is held back on one rank may be what another one waits for. What one rank may do is never taken back by
what another does, so if any order of the events finishes, all do.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from operator import length_hint
from typing import NamedTuple

import numpy as np

from ..columns import Ints, Which

#: Places around an op, in their order. The second half of a pair is behind the first by `HALF`, and sent by 1.
ASK, LATE, FORCED, NEED, THEN, EARLY, OP, SENT, REDUCED, PLACES = 0, 1, 2, 3, 4, 5, 9, 10, 12, 16
HALF = 4
FEW, MANY = 2, 8  #: transfers of a rank that may wait for the other end without holding the rest; CUDA's default is 8
FRESH, STARTED, JOINED = range(3)  #: states of a transfer
STARTS, NEEDS, RESERVES, RESERVED = range(4)  #: kinds of events, in their order at one place
FACTORS = (0, -1, 1, 2)  #: of each kind: how many times the number of transfers is added to a transfer's


class Messages(NamedTuple):
    """The messages of a plan, edge by edge, those of an edge (source to target) in the order of their sends.

    Args:
        source: the rank that sends it.
        target: the rank that receives it.
        asks: where it is asked for: `PLACES * op + place`, around an op of the target.
        sends: where it is sent, around an op of the source.
        turns: among several at one place the turn to be asked for, and to be sent; 0: the usual one.
        made: the op that makes it.
        used: the op that takes it.
        second: whether that is the second half of a pair.
        shown: the message the other way that shows its shape, where it is sent; -1: nothing has to.
        first: whether it is the first that goes forward from its stage.
        paired: whether a pair makes it, so that it may leave before the second half.
    """

    source: Ints
    target: Ints
    asks: Ints
    sends: Ints
    turns: Ints
    made: Ints
    used: Ints
    second: Which
    shown: Ints
    first: Which
    paired: Which

    def edges(self) -> list[slice]:
        """The messages of each edge."""
        new = np.diff(self.source, prepend=-1).astype(bool) | np.diff(self.target, prepend=-1).astype(bool)
        return [slice(*each) for each in pairwise([*np.flatnonzero(new).tolist(), len(self.source)])]


class Events:
    """The events of all ranks.

    A transfer is a number; those of an edge follow each other, a header before its message, behind a number that is
    always joined. With n numbers the events of transfer x are x - n: it is needed; x: it starts; x + n: it has to be
    ready to start, behind the first half of the pair that makes it; x + 2 n: it starts, as it was ready to.

    Attributes:
        programs: the events of each rank.
        places: the place of each.
        edges: the transfers of each edge, the number ahead of them included.
        state: of each transfer.
        message: of each transfer the message.
        number: of each message its transfer, that of its header is one less.
        both: of each transfer the sum of its two ranks.
    """

    def __init__(self, messages: Messages, starts: Ints, early: bool | None = None) -> None:
        """Args:
        messages: see there.
        starts: the first op of each rank.
        early: whether what the first half of a pair makes leaves before the second half; None: it may.
        """
        used = messages.used * PLACES + HALF * messages.second
        needed, through = used.copy(), np.full_like(used, -1)
        width = 1 + messages.first
        for edge in messages.edges():
            needed[edge] = np.minimum.accumulate(used[edge][::-1])[::-1]  # by it or by a later one
            through[edge][1:] = np.maximum.accumulate(used[edge])[:-1] + THEN
            width[edge.start] += 1
        posted = np.maximum(messages.asks, through)
        unknown = (messages.shown >= 0) & (messages.sends[messages.shown] > posted)
        posted = np.where(unknown, needed + FORCED, np.minimum(posted, needed + FORCED))
        usual = messages.made * PLACES
        leaves = messages.paired & (messages.sends == usual + SENT)
        sends = np.where(leaves & bool(early), usual + EARLY, messages.sends)
        number = np.cumsum(width) - 1
        n = int(number[-1]) + 1 if len(number) else 0
        heads = np.flatnonzero(messages.first)
        head = number[heads] - 1
        may, (asked, went) = early is None, messages.turns
        ready = np.flatnonzero(leaves) if may else heads[:0]
        parts = (
            (sends, number, np.where(leaves, RESERVED, STARTS) if may else STARTS, went),
            (sends[heads], head, STARTS, went[heads]),
            (usual[ready] + EARLY, number[ready], RESERVES, 0),
            (np.where(messages.first, needed + FORCED, posted), number, STARTS, np.where(messages.first, 0, asked)),
            (posted[heads], head, STARTS, asked[heads]),
            (used + NEED, number, NEEDS, 0),
            (needed[heads] + FORCED, head, NEEDS, 0),
        )
        bits = n.bit_length() + 2
        keys = np.concatenate([(place << bits) + (of << 2) + kind for place, of, kind, _ in parts])
        if messages.turns.any():
            turns = np.concatenate([np.broadcast_to(turn, place.shape) for place, _, _, turn in parts])
            keys = keys[np.lexsort((keys, turns, keys >> bits))]
        else:
            keys.sort()
        places = keys >> bits
        kinds, numbers = keys & 3, (keys >> 2) & ((1 << bits - 2) - 1)
        cuts = np.searchsorted(places, starts[1:] * PLACES)
        events = numbers + n * np.array(FACTORS)[kinds]
        self.programs = np.split(events, cuts)
        self.places = np.split(places, cuts)
        self.message, self.number = np.zeros(n, np.int64), number
        self.message[number], self.message[head] = np.arange(len(number)), heads
        state = np.zeros(n, np.int64)
        firsts = [edge.start for edge in messages.edges()]
        begins = number[firsts] - width[firsts] + 1
        state[begins] = JOINED
        self.state = state.tolist()
        self.edges = [slice(*each) for each in pairwise([*begins.tolist(), n])]
        self.both = (messages.source + messages.target)[self.message].tolist()


_ANY, _NOTHING = -1, -2


class Queues:
    """Runs events.

    Args:
        events: of all ranks, from the first one on.
        most: hardware queues of a rank.

    Attributes:
        open: transfers of each rank that are started and not joined.
    """

    def __init__(self, events: Events, most: int = FEW) -> None:
        self.events, self.most = events, most
        ranks = len(events.programs)
        self.open, self._waits_for = [0] * ranks, [_NOTHING] * ranks
        self._stand([0] * ranks)

    def _stand(self, at: Sequence[int], ends: Sequence[int] | None = None) -> None:
        """Let ranks stand at events, with those up to `ends` (None: no more) to run."""
        self._ends = at if ends is None else ends
        parts = zip(self.events.programs, at, self._ends, strict=True)
        self._left = [iter(program[begin:end].tolist()) for program, begin, end in parts]
        self._held: list[tuple[int, ...]] = [()] * len(at)

    def run(self, ends: Sequence[int] | None = None) -> bool:
        """Run the events of each rank up to one, None: all; whether every rank comes there."""
        self._stand(self.at(), [len(program) for program in self.events.programs] if ends is None else ends)
        self._waits_for = [_NOTHING] * len(self._left)
        self._runnable = list(range(len(self._left)))
        left = len(self._left)
        while self._runnable:
            left -= self._go_on(self._runnable.pop())
        return left == 0

    def at(self) -> list[int]:
        """The event that each rank has come to."""
        left = zip(self._ends, self._left, self._held, strict=True)
        return [end - length_hint(more) - len(held) for end, more, held in left]

    def leap(self, steps: Sequence[int], moved: Sequence[int]) -> None:
        """Take as run so many events of each rank, which make so many transfers of each edge and leave a state like
        the one before them."""
        state = self.events.state
        for edge, many in zip(self.events.edges, moved, strict=True):
            here = edge.start + state[edge].count(JOINED)
            state[here : edge.stop] = [JOINED] * many + state[here : edge.stop - many]
        self._stand([at + step for at, step in zip(self.at(), steps, strict=True)])

    def _go_on(self, rank: int) -> bool:
        state, both, waits_for, started = self.events.state, self.events.both, self._waits_for, self.open[rank]
        n, most = len(state), self.most
        for event in chain(self._held[rank], self._left[rank]):
            if event < 0:
                if state[event] != JOINED:
                    waits_for[rank] = event + n
                    break
            elif event >= 2 * n:
                event -= 2 * n
                if state[event]:
                    started -= 1
                    self._join(event, both[event] - rank)
                else:
                    state[event] = STARTED
            elif state[event - 1 if event < n else event - n - 1] != JOINED:
                waits_for[rank] = (event - 1) % n
                break
            elif started == most:
                waits_for[rank] = _ANY
                break
            elif event >= n:
                started += 1
            elif state[event]:
                state[event] = JOINED
                peer = both[event] - rank
                self.open[peer] -= 1
                wanted = waits_for[peer]
                if wanted in (event, _ANY):
                    waits_for[peer] = _NOTHING
                    self._runnable.append(peer)
            else:
                state[event] = STARTED
                started += 1
        else:
            self._held[rank], self.open[rank] = (), started
            return True
        self._held[rank], self.open[rank] = (event,), started
        return False

    def _join(self, transfer: int, peer: int) -> None:
        self.events.state[transfer] = JOINED
        self.open[peer] -= 1
        if self._waits_for[peer] in (transfer, _ANY):
            self._waits_for[peer] = _NOTHING
            self._runnable.append(peer)
