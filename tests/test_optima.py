"""What CP-SAT says of DualPipe's orders with transfers (needs ortools)."""

from __future__ import annotations

import importlib
from math import ceil
from pathlib import Path

import pytest

from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.bound import lower_bound
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import makespan_of

pytestmark = pytest.mark.all


@pytest.fixture(scope="module")
def optima():
    pytest.importorskip("ortools")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent.parent / "examples" / "bench")
        yield importlib.import_module("optima")


@pytest.mark.parametrize(
    ("costs", "optimum"),
    [
        (CostModel(i=1.4, w=0.6, fb=2.1, comm=0.3), 24.4),
        (CostModel(fb=2.25, comm=0.1), 22.95),
        (CostModel(i=1.2, w=0.8, fb=2.55, comm=0.2), 24.7),
    ],
)
def test_optimum_of_4_ranks(optima, costs: CostModel, optimum: float) -> None:
    worse = make_plan("dualpipe", 4, 8)
    found = optima.whole(worse, costs, 5, 120)
    assert found == pytest.approx((optimum, optimum))
    assert lower_bound(4, 8, costs, 5) <= optimum < makespan_of(worse, costs)


@pytest.mark.parametrize("ranks", [4, 8, 16])
def test_no_steady_state_of_two_micro_batches_is_shorter_than_alternating_pairs(optima, ranks: int) -> None:
    for costs in optima.MODELS:
        at_best = ceil(2 * optima.SCALE * optima.alternating(ranks, costs) - 1e-6)
        assert optima.period(ranks, 1, costs, ranks + 1, at_best - 1, 120) == "INFEASIBLE"
        assert optima.period(ranks, 1, costs, ranks + 1, at_best, 120) == "OPTIMAL"


def test_more_activations_buy_little(optima) -> None:
    costs = CostModel(fb=2.1, comm=0.2)  # alternating pairs: 4.5 for two micro-batches
    assert optima.period(4, 1, costs, 6, 89, 60) == "INFEASIBLE"
    assert optima.period(4, 1, costs, 8, 88, 60) == "OPTIMAL"
