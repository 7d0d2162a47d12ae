"""Numbers of a load report, and what the doctor makes of them."""

import json

import pytest
from simulated_profile import HEALTHY, profile

from dualpipe_engine.errors import ProfileError
from dualpipe_engine.profiling.doctor import diagnose
from dualpipe_engine.profiling.expert_load import LayerLoad, LoadReport
from dualpipe_engine.profiling.profile import Profile
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import simulate


def report(rows, ranks=2, share=0.5, stages=range(4)):
    return LoadReport(7, tuple(LayerLoad(str(stage + 1), stage, rows, ranks, share) for stage in stages))


def test_numbers_of_a_layer():
    layer = LayerLoad("3", 0, (9, 1, 2, 0), 2, 0.5)
    assert (layer.uneven, layer.least, layer.busiest_rank) == (3.0, 0.0, 10 / 6)
    assert LayerLoad("3", 0, (9, 1, 2, 0), 1, 0.5).busiest_rank == 1.0
    assert LayerLoad("3", 0, (0, 0), 2, 0.5).uneven == 1.0
    both = LoadReport(7, [LayerLoad("2", 0, (1, 1, 1, 1), 2, 0.5), layer])
    assert both.worst is layer and "layer 3, busiest expert 3.00x the mean, least used 0.00%" in str(both)
    assert both.values() == {
        "expert_load/layer_2/max_over_mean": 1.0,
        "expert_load/layer_2/least_share": 0.25,
        "expert_load/layer_3/max_over_mean": 3.0,
        "expert_load/layer_3/least_share": 0.0,
    }
    # Experts take half of the computation where they are even, and two thirds of it more where one rank has 10 of 12.
    assert both.excess(0) == pytest.approx((0.5 * 2 / 3) / (1 + 0.5 * 2 / 3)) and both.excess(1) == 0


def case_of(**load):
    return profile(micros=8, expert_load=report(**load).to_json())


def test_uneven_experts_are_named_with_their_cost():
    case = case_of(rows=(3, 3, 1, 1))
    finding = {each.name: each for each in diagnose(case)}["uneven experts"]
    even = CostModel(*(0.8 * part for part in (HEALTHY.f, HEALTHY.i, HEALTHY.w, HEALTHY.fb)))
    assert finding.gain == pytest.approx(case.makespan - simulate(case.plan, even).makespan)
    assert finding.cost == pytest.approx(0.2 * max(rank.compute for rank in case.ranks))
    assert "it has 1.50x the mean of the rows, its busiest expert 1.50x" in finding.fact
    assert "router_aux_loss_coef" in finding.advice


@pytest.mark.parametrize("load", [{"rows": (3, 1, 3, 1)}, {"rows": (3, 3, 1, 1), "ranks": 1}, {"rows": (51, 49)}])
def test_what_no_rank_waits_for_is_no_finding(load):
    """Loads of ranks that are even, though those of experts are not; experts that no other rank has; small ones."""
    assert "uneven experts" not in {each.name for each in diagnose(case_of(**load))}


def test_a_profile_keeps_the_report():
    case = case_of(rows=(3, 1, 2, 2))
    assert Profile.from_json(json.loads(json.dumps(case.to_json()))).expert_load == report((3, 1, 2, 2))
    assert profile(micros=8).expert_load is None
    empty, odd, nowhere = {"step": 1, "layers": []}, report((1, 1, 1)), report((1, 1), stages=[9])
    for broken in ({"step": 1}, empty, odd.to_json(), nowhere.to_json()):
        data = case.to_json()
        data["facts"]["expert_load"] = broken
        with pytest.raises(ProfileError, match="damaged"):
            Profile.from_json(data)
