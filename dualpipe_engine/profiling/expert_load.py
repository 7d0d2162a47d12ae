"""Expert load: how evenly the experts of each layer were used in one step, over all micro-batches and replicas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PREFIX = "expert_load/"
UNEVEN, LEAST = "max_over_mean", "least_share"


@dataclass(frozen=True)
class LayerLoad:
    """Of one layer.

    Args:
        layer: its number in the model, followed by the path of the block where it has several.
        stage: that runs it.
        rows: of each expert; none is dropped.
        ranks: that share the experts, in equal parts.
        share: of the stage's computation that its experts take where they are used evenly, estimated from parameters.
    """

    layer: str
    stage: int
    rows: Sequence[int]
    ranks: int
    share: float

    @property
    def uneven(self) -> float:
        """Rows of the busiest expert, by the mean."""
        return _uneven(self.rows)

    @property
    def least(self) -> float:
        """Share of the rows that the least used expert had."""
        return min(self.rows) / max(1, sum(self.rows))

    @property
    def busiest_rank(self) -> float:
        """Rows of the busiest of the ranks that share the experts, by the mean: how much longer all of them take."""
        each = len(self.rows) // self.ranks
        return _uneven([sum(self.rows[at : at + each]) for at in range(0, len(self.rows), each)])


@dataclass(frozen=True)
class LoadReport:
    """Of one step.

    Args:
        step: its number, from 1.
        layers: in the order of the model; at least one.
    """

    step: int
    layers: Sequence[LayerLoad]

    @property
    def worst(self) -> LayerLoad:
        return max(self.layers, key=lambda layer: layer.uneven)

    def values(self) -> dict[str, float]:
        """Name -> number, for logs: two of each layer."""
        found = {}
        for each in self.layers:
            found[f"{PREFIX}layer_{each.layer}/{UNEVEN}"] = each.uneven
            found[f"{PREFIX}layer_{each.layer}/{LEAST}"] = each.least
        return found

    def excess(self, stage: int) -> float:
        """Share of the stage's computation that would be saved by even loads: the ranks that share experts wait for
        the busiest one."""
        more = sum(each.share * (each.busiest_rank - 1) for each in self.layers if each.stage == stage)
        return more / (1 + more)

    def __str__(self) -> str:
        worst = self.worst
        return (
            f"expert load, most uneven of {len(self.layers)} layers: layer {worst.layer}, busiest expert "
            f"{worst.uneven:.2f}x the mean, least used {worst.least:.2%} of the rows"
        )

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LoadReport:
        """Read what `to_json` made.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        layers = [LayerLoad(**{**each, "rows": tuple(each["rows"])}) for each in data["layers"]]
        if not all(each.rows and each.ranks >= 1 and len(each.rows) % each.ranks == 0 for each in layers) or not layers:
            raise ValueError("a layer has no experts, or not as many on each rank")
        return cls(int(data["step"]), tuple(layers))


def _uneven(rows: Sequence[int]) -> float:
    total = sum(rows)
    return max(rows) * len(rows) / total if total else 1.0
