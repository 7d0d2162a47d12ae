"""LayerCosts: what was measured of single layers, from which the costs of any cut of them follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import ceil

from ..placement import Placement
from ..timing.costs import Bytes, CostModel, PerStage


@dataclass(frozen=True)
class LayerCosts:
    """What each layer takes, in the order of the model. Costs of the stages of the linear cut are those that were
    measured on whole stages, and each layer has its part of them.

    Args:
        bounds: of the linear cut: stage s has layers bounds[s] to bounds[s+1] - 1.
        seconds: of forward and backward.
        kept: bytes that a micro-batch keeps.
        params: trained parameters.
        with_next: whether the layer stays in one stage with the next, see `cuts.together`.
    """

    bounds: tuple[int, ...]
    seconds: tuple[float, ...]
    kept: tuple[int, ...]
    params: tuple[int, ...]
    with_next: tuple[bool, ...]

    def costs_of(self, costs: CostModel, bounds: Sequence[int]) -> CostModel:
        """Costs of the stages of another cut.

        Args:
            costs: of the stages of the linear one.
            bounds: of the other one.
        """
        time, size = self._parts(self.seconds), self._parts(self.kept)

        def of(cost: PerStage, parts: Sequence[float]) -> tuple[float, ...]:
            stages = cost if isinstance(cost, tuple) else (cost,) * (len(self.bounds) - 1)
            each = [
                stages[stage] * parts[layer]
                for stage, (start, stop) in enumerate(pairwise(self.bounds))
                for layer in range(start, stop)
            ]
            return tuple(sum(each[start:stop]) for start, stop in pairwise(bounds))

        def whole(cost: Bytes) -> tuple[int, ...]:
            return tuple(ceil(number - 1e-6) for number in of(cost, size))

        return costs.converted(partial(of, parts=time), partial(of, parts=size), whole)

    def most_params(self, placement: Placement, bounds: Sequence[int] | None = None) -> int:
        """Parameters of the rank that holds most.

        Args:
            placement: of the stages.
            bounds: of the cut; None: the linear one, with stages in equal parts.
        """
        cut = self.bounds if bounds is None else bounds
        stages = [sum(self.params[start:stop]) for start, stop in pairwise(cut)]
        ranks = range(placement.num_ranks)
        if bounds is None:
            return max(placement.held(stages, rank) for rank in ranks)
        return max(sum(stages[stage] for stage in placement.stages_of(rank)) for rank in ranks)

    def _parts(self, of_layer: Sequence[float]) -> list[float]:
        """Each layer's part of its stage; equal ones where nothing is known."""
        found: list[float] = []
        for start, stop in pairwise(self.bounds):
            total = sum(of_layer[start:stop])
            found += [each / total if total else 1 / (stop - start) for each in of_layer[start:stop]]
        return found
