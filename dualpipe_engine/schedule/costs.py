"""CostModel: how long each op takes on each stage."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import PlanError
from .op import FB, B, F, I, Op, W
from .placement import VEE, Placement

PerStage = float | tuple[float, ...]


@dataclass(frozen=True)
class CostModel:
    """Costs of a model cut into stages. Each of `f`, `i`, `w`, `fb`, `activation_bytes` is one number for all stages or
    a tuple with one number a stage.

    A pair of a forward on stage s and a backward on stage t costs `fb` where both stages have the same costs. In
    general it takes the time of both halves after each other, times the mean of the overlap factors
    `fb / (f + i + w)` of s and t, and at least the time of the longer half. A pair whose backward half is I has no w.

    Args:
        f: seconds of a forward.
        i: seconds of the input-gradient part of a backward.
        w: seconds of the weight-gradient part of a backward; a full backward takes `i + w`.
        fb: seconds of an overlapped forward and full backward; None: no overlap, `f + i + w`.
        comm: seconds of one transfer between two ranks, latency only.
        activation_bytes: bytes that one micro-batch keeps alive on a stage from its F to the end of its W.

    Raises:
        PlanError: a negative number, an `fb` below the longer half, or tuples of different lengths.
    """

    f: PerStage = 1.0
    i: PerStage = 1.0
    w: PerStage = 1.0
    fb: PerStage | None = None
    comm: float = 0.0
    activation_bytes: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        fields = {name: getattr(self, name) for name in ("f", "i", "w", "fb", "comm", "activation_bytes")}
        for name, value in fields.items():
            if value is not None and any(not number >= 0 for number in _tuple(value)):
                raise PlanError(f"cost {name} must not be negative, got {value}")
        lengths = {name: len(value) for name, value in fields.items() if isinstance(value, tuple)}
        if len(set(lengths.values())) > 1:
            raise PlanError(f"costs for different numbers of stages: {lengths}")
        for stage in range(max(lengths.values(), default=1)):
            f, i, w, fb = self.at(stage)
            if fb < max(f, i + w):
                raise PlanError(f"cost fb = {fb:g} is below its longer half (f = {f:g}, i + w = {i + w:g})")

    def at(self, stage: int) -> tuple[float, float, float, float]:
        """(f, i, w, fb) of one stage."""
        f, i, w = _at(self.f, stage), _at(self.i, stage), _at(self.w, stage)
        return f, i, w, f + i + w if self.fb is None else _at(self.fb, stage)

    def check(self, num_stages: int) -> None:
        """Raises:
        PlanError: a tuple has another length than `num_stages`.
        """
        for name in ("f", "i", "w", "fb", "activation_bytes"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != num_stages:
                raise PlanError(f"cost {name} has {len(value)} numbers for {num_stages} stages")

    def duration(self, op: Op) -> float:
        """Seconds of a compute op."""
        if op.kind == FB:
            return self._pair(op.stage, op.parts[1].stage, op.parts[1].kind)
        f, i, w, _ = self.at(op.stage)
        return {F: f, I: i, W: w, B: i + w}[op.kind]

    def _pair(self, forward_stage: int, backward_stage: int, backward_kind: str) -> float:
        there, back = self.at(forward_stage), self.at(backward_stage)
        if there == back and backward_kind == B:
            return there[3]
        f, (_, i, w, _) = there[0], back
        b = i + w if backward_kind == B else i
        factor = (_overlap(there) + _overlap(back)) / 2
        return max((f + b) * factor, f, b)

    def for_placement(self, placement: Placement) -> CostModel:
        """The same model cut for `placement`, where `self` describes it cut into `placement.num_ranks` stages.

        `vee` cuts each of these stages into two equal halves; the other placements change nothing. A schedule comparison
        on equal work needs this.
        """
        self.check(placement.num_ranks)
        if placement.name != VEE:
            return self
        halves = {name: _halve(getattr(self, name)) for name in ("f", "i", "w")}
        size = self.activation_bytes
        return replace(
            self,
            **halves,
            fb=None if self.fb is None else _halve(self.fb),
            activation_bytes=tuple(part for n in size for part in ((n + 1) // 2, n // 2))
            if isinstance(size, tuple)
            else (size + 1) // 2,
        )


def _tuple(value: PerStage) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _at(value: PerStage, stage: int) -> float:
    return value[stage] if isinstance(value, tuple) else value


def _overlap(costs: tuple[float, float, float, float]) -> float:
    f, i, w, fb = costs
    return fb / (f + i + w) if fb else 1.0


def _halve(value: PerStage) -> PerStage:
    return tuple(part / 2 for part in value for _ in range(2)) if isinstance(value, tuple) else value / 2
