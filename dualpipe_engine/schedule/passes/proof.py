"""Prove that a plan is sound, all of its ops at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..columns import (
    B_,
    BACK,
    F_,
    I_,
    OTHER,
    RECV_B_,
    RECV_F_,
    REDUCE_,
    SEND_B_,
    SEND_F_,
    STEP_,
    W_,
    Columns,
    Ints,
    Peers,
    Which,
    by_group,
    directions,
    peers,
)
from ..op import REDUCE, STEP
from ..plan import Plan


@dataclass(frozen=True)
class Report:
    """What a sound plan needs, per rank.

    Args:
        peak_activations: most (stage, micro-batch) activations alive at once.
        peak_pending_w: most weight gradients waiting at once.
        peak_receives: most receives posted and not consumed, for one directed edge and kind.
    """

    peak_activations: tuple[int, ...]
    peak_pending_w: tuple[int, ...]
    peak_receives: tuple[int, ...]


class Unproved(Exception):
    """A rule does not hold, or the plan has ops that the proof does not cover."""


def prove(plan: Plan) -> Report:
    """What a plan needs that keeps all rules of `verify`.

    Raises:
        Unproved: it breaks a rule, or has kinds of ops that only `verify` knows.
    """
    try:
        every = plan.columns
    except ValueError:
        raise Unproved from None
    _must(not (every.kind == OTHER).any())
    tail = every.kind >= REDUCE_
    facts = _Facts(plan, every.only(~tail) if tail.any() else every)
    activations, pending = facts.check_compute()
    receives = (0,) * len(plan.programs)
    lowered = bool(((every.kind >= SEND_F_) & ~tail).any() or tail.any())
    if lowered:
        receives = facts.check_transfers()
        _check_tail(plan, facts, tail, every)
    _must(completes(facts.events(lowered), 2 * facts.size))
    return Report(activations, pending, receives)


def _must(holds: bool | np.bool_) -> None:
    if not holds:
        raise Unproved


class _Facts:
    """A plan's compute ops and transfers. A key is `stage * M + micro`.

    Attributes:
        made: by way, at which op a result is made, by key; -1: nowhere.
        finished: at which op the weight gradient is complete, by key.
        size: number of keys.
    """

    def __init__(self, plan: Plan, ops: Columns) -> None:
        placement, num_micro = plan.placement, plan.num_micro
        self.plan, self.ops, self.size = plan, ops, placement.num_stages * num_micro
        kind, stage, micro, rank, _ = ops
        _must(len(kind) > 0 and (stage >= 0).all() and (stage < placement.num_stages).all())
        _must((micro >= 0).all() and (micro < num_micro).all())
        self.at_peers: Peers = peers(placement)
        self.direction = directions(placement, num_micro)[micro]
        self.back = BACK[kind].astype(np.intp)
        self.key = stage * num_micro + micro
        self.target = self.at_peers.target[self.back, self.direction, stage]
        self.source = self.at_peers.source[self.back, self.direction, stage]
        self.home = self.at_peers.home[self.direction, stage] == rank
        self.is_f, self.is_b, self.is_i, self.is_w = (kind == each for each in (F_, B_, I_, W_))
        self.passes = self.is_f | self.is_b | self.is_i  # takes a result and makes one
        self.made: tuple[Ints, Ints]
        self.finished: Ints

    def once(self, which: Which) -> Ints:
        """At which op each key stands among the entries `which`, -1: nowhere; none may stand there twice."""
        found = np.full(self.size, -1)
        found[self.key[which]] = self.ops.op[which]
        _must(np.count_nonzero(found >= 0) == np.count_nonzero(which))
        return found

    def check_compute(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Rules 1, 2, 4 and the peaks of 9."""
        kind, _, micro, rank, op = self.ops
        _must(self.home[kind <= W_].all())
        forward, backward = self.once(self.is_f), self.once(self.is_b | self.is_i)
        self.made = forward, backward
        _must((forward >= 0).all())
        self.finished = self.once(self.is_b | self.is_w)
        if (kind != F_)[kind <= W_].any():
            _must((forward < backward).all() and (self.finished >= 0).all())
        waits, runs = self.key[self.is_i], self.key[self.is_w]  # first in, first out on every rank
        _must(len(waits) == len(runs) and (waits == runs).all() and (op[self.is_i] < op[self.is_w]).all())
        halves = np.flatnonzero(op[1:] == op[:-1])
        _must((micro[halves] != micro[halves + 1]).all())
        change = self.is_f.astype(np.int64) - (self.is_b | self.is_w)
        return self._peaks(change, rank), self._peaks(self.is_i.astype(np.int64) - self.is_w, rank)

    def _peaks(self, change: Ints, rank: Ints) -> tuple[int, ...]:
        """Of each rank the largest sum of what has changed so far."""
        starts = np.searchsorted(rank, np.arange(len(self.plan.programs)))
        _must(starts[-1] < len(rank) and (np.diff(starts) > 0).all())
        so_far = np.cumsum(change)
        return tuple((np.maximum.reduceat(so_far, starts) - (so_far - change)[starts]).clip(0).tolist())

    def check_transfers(self) -> tuple[int, ...]:
        """Rules 5, 6, 8 and the peaks of 7."""
        kind, stage, _, rank, op = self.ops
        is_send = (kind == SEND_F_) | (kind == SEND_B_)
        is_receive = (kind == RECV_F_) | (kind == RECV_B_)
        _must(self.home.all())
        for which, peer, after in ((is_send, self.target, True), (is_receive, self.source, False)):
            _must((peer[which] >= 0).all())
            for back, made in enumerate(self.made):
                here = which & (self.back == back)
                self.once(here)
                there = made[self.key[here]]
                _must((there >= 0).all() and ((op[here] > there) if after else (op[here] < there)).all())
            # Each has its op, so that none lacks where the numbers are equal.
            _must(np.count_nonzero(which) == np.count_nonzero(peer[self.passes] >= 0))
        ranks = len(self.plan.programs)
        sends, receives = np.flatnonzero(is_send), np.flatnonzero(is_receive)
        sent = sends[by_group(rank[sends] * ranks + self.target[sends])]
        received = receives[by_group(self.source[receives] * ranks + rank[receives])]
        came_from = stage[received] + np.where(self.back[received], 1, -1)
        _must((self.back[sent] == self.back[received]).all() and (stage[sent] == came_from).all())
        _must((self.ops.micro[sent] == self.ops.micro[received]).all())
        return self._receive_peaks(np.flatnonzero(is_receive | (self.passes & (self.source >= 0))), is_receive)

    def _receive_peaks(self, events: Ints, is_receive: Which) -> tuple[int, ...]:
        rank, ranks = self.ops.rank, len(self.plan.programs)
        edges = (rank[events] * ranks + self.source[events]) * 2 + self.back[events]
        events = events[by_group(edges)]
        posted = np.cumsum(np.where(is_receive[events], 1, -1))  # 0 at the end of each edge
        peaks = np.zeros(ranks, np.int64)
        if len(events):
            here = rank[events]
            starts = np.flatnonzero(np.diff(here, prepend=-1))
            peaks[here[starts]] = np.maximum.reduceat(posted, starts)
        return tuple(peaks.tolist())

    def events(self, lowered: bool) -> list[list[int]]:
        """For each rank what it needs from other ranks (`key`) and what it makes for them (`~key`), in order; keys of
        the way back are behind those of the way there. What a rank needs from itself is looked at here."""
        kind, stage, _, rank, op = self.ops
        step = np.where(self.back, 1, -1)
        takes = self.passes & (stage + step >= 0) & (stage + step < self.plan.placement.num_stages)
        needed = self.key + step * self.plan.num_micro
        for back, made in enumerate(self.made):
            own = takes & (self.source < 0) & (self.back == back)
            _must((made[needed[own]] < op[own]).all())
        waits = takes & (self.source >= 0)
        makes = kind >= SEND_F_ if lowered else self.passes & (self.target >= 0)
        makes &= (kind != RECV_F_) & (kind != RECV_B_)
        # A pair makes its results when both halves have what they need.
        places = np.concatenate([2 * op[waits], 2 * op[makes] + 1])
        behind = self.back * self.size
        what = np.concatenate([(needed + behind)[waits], ~(self.key + behind)[makes]])
        order = np.argsort(places, kind="stable")
        what, ranks = what[order], np.concatenate([rank[waits], rank[makes]])[order]
        return [part.tolist() for part in np.split(what, np.searchsorted(ranks, np.arange(1, len(self.plan.programs))))]


def completes(events: list[list[int]], keys: int) -> bool:
    """Rules 3, 4 and 7: whether each rank can go through its events; each key is made once and needed by one rank."""
    there = [0] * keys  # at `~key`: 1 where it has been made, `~rank` where that rank waits for it
    ranks = [iter(each) for each in events]
    runnable, left = list(range(len(ranks))), len(ranks)
    while runnable:
        rank = runnable.pop()
        for key in ranks[rank]:
            if key < 0:
                if there[key] < 0:
                    runnable.append(~there[key])
                there[key] = 1
            elif not there[~key]:
                there[~key] = ~rank
                break
        else:
            left -= 1
    return left == 0


def _check_tail(plan: Plan, facts: _Facts, tail: Which, every: Columns) -> None:
    """Rule 10."""
    placement = plan.placement
    if not (facts.finished >= 0).any():  # forward-only
        return _must(not tail.any())
    last = facts.finished.reshape(placement.num_stages, plan.num_micro)
    places: list[list[tuple[str, int, int]]] = [[] for _ in plan.programs]
    for kind, stage, _, rank, op in zip(*(column[tail].tolist() for column in every), strict=True):
        places[rank].append((STEP if kind == STEP_ else REDUCE, stage, op))
    end = 0
    orders: list[list[int]] = []
    for rank, found in enumerate(places):
        end += len(plan.programs[rank])
        _must(bool(found) and found[-1][0] == STEP and found[-1][2] == end - 1)
        _must(all(kind == REDUCE for kind, _, _ in found[:-1]))
        order = [stage for _, stage, _ in found[:-1]]
        stages = placement.stages_of(rank)
        _must(len(order) == len(set(order)) and set(order) == set(stages))
        for _, stage, op in found[:-1]:
            for direction, home in enumerate(placement.replicas(stage)):
                micros = placement.micros(direction, plan.num_micro)
                if home == rank and micros:
                    _must(op > last[stage, micros.start : micros.stop : micros.step].max())
        orders.append(order)
        twin = min(placement.replicas(min(stages)))
        _must(twin > rank or orders[twin] == order)
