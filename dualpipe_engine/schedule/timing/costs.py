"""CostModel: how long each op takes on each stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from ...errors import PlanError
from ..op import FB, B, F, I, Op, W
from ..placement import Placement

PerStage = float | tuple[float, ...]
Bytes = int | tuple[int, ...]


LEAST, MOST = 1e-30, 1e30  #: costs, in any unit, with whose sums and ratios floating point can reckon


@dataclass(frozen=True)
class CostModel:
    """Costs of a model cut into stages; each but `comm` is one number for all stages or a tuple, one number a stage.

    A pair of a forward on stage s and a full backward on stage t takes `fb` where s and t cost the same. In general it
    takes the time of its halves one after the other times the mean of the overlap factors `fb / (f + i + w)` of s and
    t, but at least the time of the longer half. This also covers a pair with I, which has no w.

    Args:
        f: seconds of a forward.
        i: seconds of the input-gradient part of a backward.
        w: seconds of the weight-gradient part of a backward; a full backward takes `i + w`.
        fb: seconds of an overlapped forward and full backward; None: no overlap, `f + i + w`.
        comm: seconds of one transfer between two ranks.
        activation_bytes: bytes that one micro-batch keeps alive on a stage from the start of F to the end of W.
        pending_bytes: of these what is left from the end of I to the end of W, with what I has added; None: as much.
        copy: seconds of the copy of what one micro-batch keeps alive on a stage to host memory, and of that back.

    Raises:
        PlanError: a negative number, one that sums cannot hold, or tuples of different lengths.
    """

    f: PerStage = 1.0
    i: PerStage = 1.0
    w: PerStage = 1.0
    fb: PerStage | None = None
    comm: float = 0.0
    activation_bytes: Bytes = 1
    pending_bytes: Bytes | None = None
    copy: PerStage = 0.0

    def __post_init__(self) -> None:
        lengths = {}
        for name in ("f", "i", "w", "fb", "comm", "copy", "activation_bytes", "pending_bytes"):
            value = getattr(self, name)
            if isinstance(value, tuple):
                lengths[name] = len(value)
            numbers = value if isinstance(value, tuple) else () if value is None else (value,)
            if not all(number >= 0 for number in numbers):
                raise PlanError(f"cost {name} must not be negative, got {value}")
            if not all(number == 0 or LEAST <= number <= MOST for number in numbers):
                raise PlanError(
                    f"cost {name} must be 0 or between {LEAST:g} and {MOST:g}, got {value}: take another unit"
                )
        if len(set(lengths.values())) > 1:
            raise PlanError(f"costs for different numbers of stages: {lengths}")

    def at(self, stage: int) -> tuple[float, float, float, float]:
        """(f, i, w, fb) of one stage."""
        f, i, w = _at(self.f, stage), _at(self.i, stage), _at(self.w, stage)
        return f, i, w, f + i + w if self.fb is None else _at(self.fb, stage)

    def check(self, num_stages: int) -> None:
        """Check that the costs are for `num_stages` stages.

        Raises:
            PlanError: a tuple has another length.
        """
        for name in ("f", "i", "w", "fb", "copy", "activation_bytes", "pending_bytes"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != num_stages:
                raise PlanError(f"cost {name} has {len(value)} numbers, but there are {num_stages} stages")

    def copy_at(self, stage: int) -> float:
        """Seconds of a copy of one stage's activation between device and host."""
        return _at(self.copy, stage)

    def duration(self, op: Op) -> float:
        """Seconds of a compute op."""
        if op.kind == FB:
            return self._pair(*op.parts)
        f, i, w, _ = self.at(op.stage)
        return {F: f, I: i, W: w, B: i + w}[op.kind]

    def _pair(self, forward: Op, backward: Op) -> float:
        there, back = self.at(forward.stage), self.at(backward.stage)
        if there == back and backward.kind == B:
            return there[3]
        f, b = self.duration(forward), self.duration(backward)
        return max((f + b) * (_overlap(*there) + _overlap(*back)) / 2, f, b)

    def for_placement(self, placement: Placement) -> CostModel:
        """The same model cut for `placement`, where `self` describes it cut into `placement.num_ranks` stages.

        Each of these stages is cut into `placement.parts` equal parts.

        Raises:
            PlanError: the costs are for another number of stages.
        """
        self.check(placement.num_ranks)
        if placement.parts == 1:
            return self
        cut = partial(_cut, parts=placement.parts)
        return self.converted(cut, cut, partial(_cut_bytes, parts=placement.parts))

    def converted(
        self,
        compute: Callable[[PerStage], PerStage],
        copy: Callable[[PerStage], PerStage],
        size: Callable[[Bytes], Bytes],
    ) -> CostModel:
        """The costs of other stages.

        Args:
            compute: from seconds of F, I, W or F&B to those of the other stages.
            copy: from seconds of copies to host memory.
            size: from bytes of activations.
        """
        return replace(
            self,
            f=compute(self.f),
            i=compute(self.i),
            w=compute(self.w),
            fb=None if self.fb is None else compute(self.fb),
            copy=copy(self.copy),
            activation_bytes=size(self.activation_bytes),
            pending_bytes=None if self.pending_bytes is None else size(self.pending_bytes),
        )

    def joined(self, parts: int) -> CostModel:
        """The reverse of `for_placement`, without bytes: the costs of the model cut into one `parts`-th of the stages.

        Of a cost that is one number for all stages the same is true of the joined ones.
        """
        join = partial(_join, parts=parts)
        return replace(self.converted(join, join, lambda _: 1), pending_bytes=None)


UNIT = CostModel()  #: f = i = w = 1, no overlap, transfers for nothing


def _at(value: PerStage, stage: int) -> float:
    return value[stage] if isinstance(value, tuple) else value


def _overlap(f: float, i: float, w: float, fb: float) -> float:
    return fb / (f + i + w) if f + i + w else 1.0


def _cut(value: PerStage, parts: int) -> PerStage:
    return tuple(each / parts for each in value for _ in range(parts)) if isinstance(value, tuple) else value / parts


def _cut_bytes(size: Bytes, parts: int) -> Bytes:
    return tuple(-(-n // parts) for n in size for _ in range(parts)) if isinstance(size, tuple) else -(-size // parts)


def _join(value: PerStage, parts: int) -> PerStage:
    if not isinstance(value, tuple):
        return parts * value
    return tuple(sum(value[at : at + parts]) for at in range(0, len(value), parts))
