"""Move transfers for which ranks would wait for each other for good, because they have few hardware queues."""

from __future__ import annotations

import numpy as np

from ...errors import PlanError
from ..columns import Ints
from .queues import (
    ASK,
    FEW,
    FRESH,
    HALF,
    JOINED,
    LATE,
    MANY,
    NEED,
    PLACES,
    SENT,
    STARTED,
    THEN,
    Events,
    Messages,
    Queues,
)
from .repeats import finishes

MOVES = 16  #: of each message, after which the search for places is given up
ROUNDS = 4  #: what is moved for one kind of pairs may have to move again for the other


def unlock(messages: Messages, starts: Ints, num_micro: int) -> Messages:
    """The messages, placed such that every rank comes to its end, whether the halves of pairs run together or not.

    Places are those for few hardware queues, or where there are none (each rank's pair feeds those of both neighbours)
    those for as many as devices have by default. One hardware queue for all streams is enough for either.

    Args:
        messages: at their usual places.
        starts: the first op of each rank.
        num_micro: micro-batches of the batch.

    Raises:
        PlanError: no places were found.
    """
    if not len(messages.source):
        return messages
    moved = period_of(messages, starts, num_micro)
    try:
        return _unlocked(messages, starts, moved, FEW)
    except PlanError:
        return _unlocked(messages, starts, moved, MANY)


def period_of(messages: Messages, starts: Ints, num_micro: int) -> Ints:
    """Of each edge how many messages pass before an order repeats: those of as many micro-batches as there are ranks,
    which is what orders repeat after that do not repeat with one or two."""
    return np.array([each.stop - each.start for each in messages.edges()]) * len(starts) // num_micro


def _unlocked(messages: Messages, starts: Ints, moved: Ints, most: int) -> Messages:
    # Where a pair makes the first message of a stage, its header needs the other end at once.
    kinds = (False, True) if (messages.paired & messages.first).any() else (None,)
    for _ in range(ROUNDS):
        before = messages
        for early in kinds:
            queues = Queues(Events(messages, starts, early), most)
            if not finishes(queues, moved):
                messages = _Places(messages, queues).found()
        if messages is before:
            return messages
    raise _no_places()


def _no_places() -> PlanError:
    return PlanError(
        "the ranks of this plan would wait for each other's transfers: use another number of micro-batches, or "
        '"optimize": false'
    )


class _Places:
    """Runs events on from where all ranks wait, and moves what they wait for.

    A receive is asked for earlier, where its rank stands, if a send is held back for it. Failing that, a transfer that
    is held back is put off: it starts before one of the next ops, as soon as it may. What is moved starts where its
    rank stands at that moment, so that the events still finish in the order in which they have run here.
    """

    def __init__(self, messages: Messages, queues: Queues) -> None:
        self._messages, self._events, self._open, self._at = messages, queues.events, queues.open, queues.at()
        self._most = queues.most
        self._n, self._state = len(queues.events.state), queues.events.state
        self._programs = [each.tolist() for each in queues.events.programs]
        self._places = [each.tolist() for each in queues.events.places]
        self._asks, self._sends, self._turns = messages.asks.copy(), messages.sends.copy(), messages.turns.copy()
        self._turn = int(messages.turns.max())
        self._put_off: list[list[int]] = [[] for _ in self._programs]  # messages, by rank
        used = messages.used * PLACES + HALF * messages.second + NEED
        self._edge = np.zeros(len(used), np.int64)
        self._taken = np.full_like(used, -1)  # where all those ahead of a message on its edge have been taken
        for number, edge in enumerate(messages.edges()):
            self._edge[edge] = number
            self._taken[edge][1:] = np.maximum.accumulate(used[edge])[:-1]

    def found(self) -> Messages:
        """The messages at places where all events finish.

        Raises:
            PlanError: there are none.
        """
        ranks = range(len(self._programs))
        while True:
            while any(self._go_on(rank) for rank in ranks):
                pass
            if not any(self._put_off) and all(self._at[rank] == len(self._programs[rank]) for rank in ranks):
                return self._messages._replace(asks=self._asks, sends=self._sends, turns=self._turns)
            held = [rank for rank in ranks if self._at[rank] < len(self._programs[rank])]
            most = MOVES * len(self._edge)
            if self._turn > most or not (any(map(self._ask_earlier, held)) or any(map(self._delay, held))):
                raise _no_places()

    def _go_on(self, rank: int) -> bool:
        """Run events of a rank until it waits; whether there were any."""
        moved = False
        while self._step(rank):
            moved = True
        return moved

    def _step(self, rank: int) -> bool:
        at, program, n = self._at[rank], self._programs[rank], self._n
        if self._put_off[rank] and self._start_one(rank):
            return True
        if at == len(program):
            return False
        event = program[at]
        if event < 0:
            if self._state[event] != JOINED:
                return False
        elif event >= 2 * n:
            self._open[rank] -= 1
            self._start(rank, event - 2 * n)
        else:
            edge = self._edge[self._events.message[event % n]]
            if any(self._edge[other] == edge for other in self._put_off[rank]) and self._delay(rank):
                return True
            if not self._may_start(rank, event % n):
                return False
            if event < n:
                self._start(rank, event)
            else:
                self._open[rank] += 1
        self._at[rank] += 1
        return True

    def _may_start(self, rank: int, transfer: int) -> bool:
        return self._state[transfer - 1] == JOINED and self._open[rank] < self._most

    def _start(self, rank: int, transfer: int) -> None:
        if self._state[transfer] == STARTED:
            self._state[transfer] = JOINED
            self._open[self._events.both[transfer] - rank] -= 1
        else:
            self._state[transfer] = STARTED
            self._open[rank] += 1

    def _sent_by(self, rank: int, message: int) -> bool:
        return bool(self._messages.source[message] == rank)

    def _transfers(self, rank: int, message: int) -> list[int]:
        """What moves with a message: its header and itself where it is sent, the first of them at the other end."""
        last = int(self._events.number[message])
        first = last - int(self._messages.first[message])
        return list(range(first, last + 1 if self._sent_by(rank, message) else first + 1))

    def _ask_earlier(self, rank: int) -> bool:
        """Ask for what a held send of this rank has behind it; whether that is possible."""
        event = self._programs[rank][self._at[rank]]
        before = event % self._n - 1
        if event < 0 or self._state[before] != STARTED or not self._sent_by(rank, self._events.message[before + 1]):
            return False
        peer, message = self._events.both[before] - rank, int(self._events.message[before])
        place = self._here(peer)
        if (
            place is None
            or before not in self._transfers(peer, message)
            or message in self._put_off[peer]
            or not self._may_start(peer, before)
            or not self._may_ask(peer, message)
        ):
            return False
        usual = self._programs[peer].index(before, self._at[peer])
        del self._programs[peer][usual], self._places[peer][usual]
        self._put(peer, message, *place)
        return True

    def _may_ask(self, rank: int, message: int) -> bool:
        """Whether what is ahead on the edge has been taken, and the shape is known."""
        at, places, shown = self._at[rank], self._places[rank], self._messages.shown[message]
        if at == len(places):
            return True
        known = shown < 0 or (self._sends[shown] < places[at] and shown not in self._put_off[rank])
        return bool(self._taken[message] < places[at] and known)

    def _delay(self, rank: int) -> bool:
        """Put off what the rank would start next; whether that is possible."""
        at, program = self._at[rank], self._programs[rank]
        event, place = program[at], self._places[rank][at]
        if event < 0 or event >= 2 * self._n:
            return False
        message = int(self._events.message[event % self._n])
        transfers = self._transfers(rank, message)
        if event % self._n != transfers[0]:
            return False
        if not self._sent_by(rank, message) and place % PLACES not in (ASK, LATE, THEN, THEN + HALF):
            return False  # it is needed now
        for transfer in transfers:
            for each in {transfer, transfer + self._n, transfer + 2 * self._n}.intersection(program[at:]):
                found = program.index(each, at)
                del program[found], self._places[rank][found]
        self._put_off[rank].append(message)
        return True

    def _start_one(self, rank: int) -> bool:
        """Start one of those that are put off, where the rank stands; whether one may."""
        place = self._here(rank)
        if place is None or place[1] % PLACES in (ASK, SENT):
            return False  # what the rank would start next is put off before anything moves ahead of it
        edges = set()
        for message in self._put_off[rank]:
            first, *more = self._transfers(rank, message)
            if self._edge[message] in edges or not self._may_start(rank, first):
                edges.add(self._edge[message])
                continue
            edges.add(self._edge[message])
            if self._sent_by(rank, message):
                ready = place[1] >= self._messages.made[message] * PLACES + SENT
                ready = ready and (not more or self._state[first] == STARTED)  # the header needs the other end at once
            else:
                ready = self._may_ask(rank, message)
            if ready:
                self._put_off[rank].remove(message)
                self._put(rank, message, *place)
                return True
        return False

    def _here(self, rank: int) -> tuple[int, int] | None:
        """Where a rank stands, as event and place; None: in an op that has let another rank go on, so that nothing goes
        there."""
        at, places, program = self._at[rank], self._places[rank], self._programs[rank]
        if at == len(places):
            return at, places[-1] // PLACES * PLACES + SENT + 1
        op, place = divmod(places[at], PLACES)
        if place <= LATE or place >= SENT:
            return at, places[at]
        while at and places[at - 1] > op * PLACES + LATE:
            at -= 1
            if program[at] >= 0 and self._state[program[at] % self._n] == JOINED:
                return None
        return at, op * PLACES + LATE

    def _put(self, rank: int, message: int, at: int, place: int) -> None:
        """Start a message before an event, none of those behind which moves past it."""
        program, places = self._programs[rank], self._places[rank]
        transfers = self._transfers(rank, message)
        of_sends = self._sent_by(rank, message)
        (self._sends if of_sends else self._asks)[message] = place
        self._give_turn(of_sends, message)
        for behind in range(at, len(program)):
            if places[behind] != place:
                break
            if program[behind] >= 0:
                other = int(self._events.message[program[behind] % self._n])
                self._give_turn(self._sent_by(rank, other), other)
        for event in program[at : self._at[rank]]:
            if event >= 0:  # the other end has not seen it
                self._open[rank] -= 1
                if event < self._n:
                    self._state[event] = FRESH
        program[at:at], places[at:at] = transfers, [place] * len(transfers)
        self._at[rank] = at + len(transfers)
        for transfer in transfers:
            self._start(rank, transfer)
        later = message + 1
        while not of_sends and later < len(self._edge) and self._edge[later] == self._edge[message]:
            if self._asks[later] > place:
                break
            self._asks[later] = place
            self._give_turn(False, later)
            later += 1

    def _give_turn(self, of_sends: bool, message: int) -> None:
        self._turn += 1
        self._turns[int(of_sends), message] = self._turn
