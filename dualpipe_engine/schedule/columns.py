"""Columns: the ops of a plan as arrays of numbers, for what looks at all of them at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .op import FB, RECV_B, RECV_F, REDUCE, SEND_B, SEND_F, STEP, B, F, I, Op, W
from .placement import Placement

Ints = NDArray[np.integer]
Which = NDArray[np.bool_]

#: Numbers of the kinds. `OTHER` stands for a kind that takes and makes nothing that another op waits for.
F_, B_, I_, W_, SEND_F_, RECV_F_, SEND_B_, RECV_B_, REDUCE_, STEP_, OTHER, _PAIR = range(12)


class _Numbers(dict[str, int]):
    def __missing__(self, kind: str) -> int:
        return OTHER


_NAMES = (F, B, I, W, SEND_F, RECV_F, SEND_B, RECV_B, REDUCE, STEP)
_NUMBER = _Numbers({kind: at for at, kind in enumerate(_NAMES)} | {FB: _PAIR})
#: Of each kind whether it is on the way back, from the last stage to the first.
BACK = np.array([kind not in (F_, SEND_F_, RECV_F_) for kind in range(OTHER + 1)])


class Columns(NamedTuple):
    """One entry an op, in the order of ranks and programs; a pair has two, its forward first.

    Args:
        kind: one of the numbers of this module.
        stage: of the op.
        micro: of the op.
        rank: the rank in whose program it stands.
        op: its position among all ops of the plan; both halves of a pair have the same.
    """

    kind: Ints
    stage: Ints
    micro: Ints
    rank: Ints
    op: Ints

    def only(self, which: Which) -> Columns:
        """The entries that are marked; ops keep their positions."""
        return Columns(*(column[which] for column in self))


def columns(programs: Sequence[Sequence[Op]]) -> Columns:
    """The columns of programs, one a rank.

    Raises:
        ValueError: a pair is not one F and one B or I, or a number is out of all bounds.
    """
    kinds, stages, micros, parts = _fields(chain.from_iterable(programs))
    number = _kinds(kinds)
    is_pair = number == _PAIR
    if parts.count(()) + np.count_nonzero(is_pair) != len(parts):
        raise ValueError("an op that is no pair has parts")
    at = np.repeat(np.arange(len(number)), 1 + is_pair)
    rank = np.repeat(np.arange(len(programs)), [len(program) for program in programs])
    found = Columns(number[at], _numbers(stages)[at], _numbers(micros)[at], rank[at], at)
    first = np.flatnonzero(is_pair) + np.arange(np.count_nonzero(is_pair))
    halves = list(chain.from_iterable(parts))
    if len(halves) != 2 * len(first):
        raise ValueError("a pair is one F and one B or I")
    kinds, stages, micros, _ = _fields(halves)
    of_halves = _kinds(kinds)
    if (of_halves[::2] != F_).any() or not np.isin(of_halves[1::2], (B_, I_)).all():
        raise ValueError("a pair is one F and one B or I")
    place = np.stack([first, first + 1], 1).ravel()
    found.kind[place], found.stage[place], found.micro[place] = of_halves, _numbers(stages), _numbers(micros)
    return found


def _fields(ops: Iterable[Op]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """Kinds, stages, micro-batches and parts."""
    flat: list[Any] = list(chain.from_iterable(ops))
    return flat[::4], flat[1::4], flat[2::4], flat[3::4]


def _kinds(kinds: list[str]) -> Ints:
    return np.fromiter(map(_NUMBER.__getitem__, kinds), np.int8, len(kinds))


def _numbers(numbers: list[int]) -> Ints:
    try:
        return np.fromiter(numbers, np.int64, len(numbers))
    except OverflowError:
        raise ValueError("a number is out of all bounds") from None


class Peers(NamedTuple):
    """Between which ranks tensors travel, by way (0 forward, 1 back), direction and stage; -1: to or from no other
    rank.

    Args:
        home: the rank of a stage, by direction and stage.
        target: where what a stage makes goes.
        source: where what a stage takes comes from.
    """

    home: Ints
    target: Ints
    source: Ints


def peers(placement: Placement) -> Peers:
    """The peers of every stage of a placement."""
    directions, stages = range(placement.num_directions), range(placement.num_stages)
    home = np.array([[placement.rank(stage, direction) for stage in stages] for direction in directions])
    following = np.full_like(home, -1)
    following[:, :-1] = np.where(home[:, 1:] != home[:, :-1], home[:, 1:], -1)
    before = np.full_like(home, -1)
    before[:, 1:] = np.where(home[:, 1:] != home[:, :-1], home[:, :-1], -1)
    return Peers(home, np.stack([following, before]), np.stack([before, following]))


def directions(placement: Placement, num_micro: int) -> Ints:
    """The direction of each micro-batch."""
    return np.fromiter(map(placement.direction, range(num_micro)), np.int64, num_micro)


def by_group(groups: Ints) -> Ints:
    """The positions of an array of numbers from 0, those of equal numbers together and in order."""
    if len(groups) and groups.max() >= 1 << 16:
        if groups.max() >= 1 << 24:
            return np.argsort(groups, kind="stable")
        groups = (np.cumsum(np.bincount(groups) > 0) - 1)[groups]
    if not len(groups) or groups.max() < 1 << 16:
        groups = groups.astype(np.uint16)  # sorted by counting
    return np.argsort(groups, kind="stable")


def make_ops(kinds: Ints, stages: Ints, micros: Ints) -> list[Op]:
    """Many ops, none of them a pair, of kinds that have a number of their own."""
    each = zip(map(_NAMES.__getitem__, kinds.tolist()), stages.tolist(), micros.tolist(), repeat(()), strict=False)
    return list(map(tuple.__new__, repeat(Op), each))
