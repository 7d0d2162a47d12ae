"""Schedules under the memory of a job: what fits as it is stays, what does not gets the cheapest change."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest

from dualpipe_engine.schedule.jobs.under_memory import Asked, under_memory
from dualpipe_engine.schedule.passes.offload import offload
from dualpipe_engine.schedule.passes.verify import verify
from dualpipe_engine.schedule.placement import LINEAR, Placement
from dualpipe_engine.schedule.search.compare import best_of, compare
from dualpipe_engine.schedule.search.job_costs import Measurement
from dualpipe_engine.schedule.search.layer_costs import LayerCosts
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import peak_bytes, simulate
from dualpipe_engine.viz.fitting import fitting_table

RANKS, MICROS, STATE = 4, 8, 100
KEYS = ("linear", "bidirectional", "vee", "loop of 2")


def job(memory, copy=0.5, state=STATE):
    costs = CostModel(1, 1, 1, activation_bytes=20, copy=copy)
    return Measurement(costs, RANKS, 64, state_bytes=dict.fromkeys(KEYS, state), memory_bytes=memory)


def asked(**more):
    return Asked(MICROS, **{"stages_per_rank": 2} | more)


def by_name(memory, copy=0.5, **more):
    return {rung.schedule: rung for rung in under_memory(job(memory, copy), asked(**more))}


def test_what_fits_is_as_it_is():
    plain = compare(RANKS, MICROS, job(None).costs, job=job(None))
    for memory in (None, 10_000):
        for row, rung in zip(plain, under_memory(job(memory), asked()), strict=True):
            assert rung.plan == row.plan and rung.total == row.total and rung.memory == row.memory
            assert rung.fewer is False and rung.plain is None and not rung.tried


@pytest.mark.parametrize("memory", [175, 160, 150, 145])
def test_what_does_not_fit_takes_the_fastest_change_that_does(memory):
    found = by_name(memory)
    moved = [rung for rung in found.values() if rung.feasible and rung.fewer]
    assert moved
    for rung in found.values():
        if rung.plain is None:
            assert rung.memory <= memory
            continue
        assert rung.plain.memory > memory
        fit = [each for each in rung.tried if each.memory <= memory]
        assert rung.feasible == bool(fit)
        assert not fit or rung.total == min(each.total for each in fit)
        assert fit or f"{memory} B are free" in rung.reason
    for rung in moved:
        costs = job(memory).costs.for_placement(rung.plan.placement)
        plan = offload(rung.plan, rung.fewer, costs)
        verify(plan)
        assert rung.memory == STATE + max(peak_bytes(plan, costs)) <= memory
        assert rung.makespan == simulate(plan, costs).makespan
        if rung.fewer > 1:
            assert STATE + max(peak_bytes(offload(rung.plan, rung.fewer - 1, costs), costs)) > memory


def test_slow_copies_lose_against_a_cap():
    fast, slow = (by_name(178, copy)["zbv"] for copy in (0.0, 40.0))
    assert fast.fewer and fast.cap is None and fast.change == f'"offload_activations": {fast.fewer}'
    assert not slow.fewer and slow.change == f'"activation_cap": {slow.cap}'
    assert slow.total > fast.total


def test_what_the_user_says_stays():
    for wanted in (False, 1, True):
        for rung in by_name(160, fewer=wanted).values():
            assert rung.fewer is wanted or rung.plan is None
            assert all(each.fewer is wanted for each in rung.tried)
    assert all(rung.cap is not None for rung in by_name(160, fewer=False).values() if rung.feasible and rung.plain)


def test_the_table_says_what_changes_cost_and_save():
    from rich.console import Console

    rungs = under_memory(job(160), asked())
    console = Console(width=140, record=True, file=StringIO())
    console.print(fitting_table(rungs, 160))
    lines = console.export_text().splitlines()
    assert "160 B are free" in lines[0]
    for rung in rungs:
        mine = [line for line in lines if f" {rung.name} " in line]
        assert len(mine) == (0 if rung.plain is None else 1 + len(rung.tried))
        marked = [line for line in mine if ">" in line]
        assert len(marked) == (1 if rung.plain and rung.feasible else 0)
        for line in marked:
            assert rung.change in line and "yes" in line
            assert f"{rung.total - rung.plain.total:+.4g}" in line and f"{rung.plain.memory - rung.memory} B" in line
    assert best_of(rungs).memory <= 160


def test_what_is_computed_again_makes_room():
    """It is tried where a schedule does not fit, costs its time, and is not tried where the user has said."""
    again = CostModel(1, 1.5, 1, activation_bytes=12, pending_bytes=12, copy=0.3)
    both = replace(job(150), recomputed=again)
    found = {rung.schedule: rung for rung in under_memory(both, asked())}
    rung = found["1f1b"]
    assert rung.recompute and rung.fewer is False and rung.memory == STATE + RANKS * 12 <= 150
    assert rung.change == '"recompute": true' and rung.total == simulate(rung.plan, again).makespan
    assert all(each.tried[-1].recompute for each in found.values() if each.plain)
    tight = {rung.schedule: rung for rung in under_memory(replace(both, memory_bytes=140), asked())}["1f1b"]
    assert tight.recompute and tight.fewer == 1 and tight.change == '"recompute": true, "offload_activations": 1'
    assert not any(rung.recompute for rung in under_memory(both, asked(may_recompute=False)))
    assert not any(rung.recompute for rung in under_memory(replace(both, memory_bytes=10_000), asked()))


LAYERS = LayerCosts(
    bounds=(0, 4, 8, 12, 16),
    seconds=(0.5,) * 15 + (3.0,),
    kept=(5,) * 12 + (2, 2, 2, 14),
    params=(10,) * 16,
    with_next=(False,) * 16,
)


def uneven(memory=None):
    """Four stages of four layers, the last of which is as long as six."""
    times = (2.0, 2.0, 2.0, 4.5)
    costs = CostModel(times, times, times, activation_bytes=20, copy=0.5)
    return Measurement(costs, RANKS, 16, state_bytes=dict.fromkeys(KEYS, STATE), memory_bytes=memory, of_layers=LAYERS)


def test_costs_of_a_cut_are_sums_of_those_of_its_layers():
    costs = uneven().costs
    assert LAYERS.costs_of(costs, LAYERS.bounds) == replace(costs, activation_bytes=(20,) * 4, copy=(0.5,) * 4)
    moved = LAYERS.costs_of(costs, (0, 5, 10, 15, 16))
    assert moved.f == pytest.approx((2.5, 2.5, 2 + 0.5, 3.0))
    assert moved.activation_bytes == (25, 25, 16, 14) and sum(moved.copy) == pytest.approx(2.0)
    assert LAYERS.most_params(Placement(LINEAR, 4), (0, 5, 10, 15, 16)) == 50
    assert LAYERS.most_params(Placement(LINEAR, 4)) == 40
    assert uneven().state(Placement(LINEAR, 4), (0, 5, 10, 15, 16)) == STATE * 5 // 4


def test_the_faster_cut_is_taken_and_both_are_shown():
    rows = {row.name: row for row in under_memory(uneven(), asked(stages_per_rank=None))}
    assert {"interleaved x2", "interleaved x4", "interleaved_zb x2", "interleaved_zb x4"} <= rows.keys()
    row = rows["1f1b"]
    assert row.counts == "5,5,5,1" and row.change == '"partition_method": "5,5,5,1"'
    assert row.total < 0.8 * row.plain.total and [each.bounds for each in row.tried] == [row.bounds]
    costs = LAYERS.costs_of(uneven().costs, row.bounds)
    assert row.makespan == simulate(row.plan, costs).makespan
    stays = {row.name: row for row in under_memory(uneven(), asked(may_cut=False))}["1f1b"]
    assert stays.bounds is None and stays.total == row.plain.total and not stays.tried


def test_several_stages_a_rank_are_those_whose_costs_are_known():
    """Half a stage takes half its time only where layers are alike: with a head in it there is no such cut."""
    rows = {row.name: row for row in under_memory(uneven(), asked())}
    for name in ("zbv", "vhalf", "interleaved x2"):
        assert rows[name].bounds is not None and rows[name].plain.total < rows[name].total
    assert rows["dualpipe"].total <= rows["dualpipe"].plain.total


def test_a_cut_may_be_what_makes_it_fit_or_not():
    """More layers on the first ranks hold more: then the cut as it is stays, or both are changed."""
    plain = {row.name: row for row in under_memory(uneven(), asked())}["1f1b"]
    needs = {each.bounds: each.memory for each in (plain.plain, *plain.tried)}
    assert needs[plain.bounds] > needs[None]
    tight = {row.name: row for row in under_memory(uneven(needs[None]), asked())}["1f1b"]
    assert tight.memory <= needs[None] and any(each.bounds and each.fewer for each in tight.tried)
    assert tight.total == min(each.total for each in (tight.plain, *tight.tried) if each.memory <= needs[None])


def test_what_does_not_fit_at_all_names_what_needs_least():
    row = {row.name: row for row in under_memory(uneven(STATE + 1), asked())}["1f1b"]
    least = min((row.plain, *row.tried), key=lambda each: each.memory)
    assert not row.feasible and f"1f1b needs {least.memory} B at least, with {least.change}, " in row.reason
