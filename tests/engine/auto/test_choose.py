""" "auto": it measures once, leaves the model as it was, takes the simulated best, and trains the same."""

from __future__ import annotations

import auto_runs
import pytest
from ranks import RankError

from dualpipe_engine.cli import main
from dualpipe_engine.engine.auto.choose import choose
from dualpipe_engine.engine.section import DualPipeConfig
from dualpipe_engine.errors import PlanError
from dualpipe_engine.schedule.orders.registry import tried
from dualpipe_engine.schedule.search.compare import best_of
from dualpipe_engine.schedule.search.job_costs import Measurement
from dualpipe_engine.schedule.search.layer_costs import LayerCosts
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import simulate

FREE = {}
SLOW_TWINS = {"linear": 0.0, "bidirectional": 40.0, "vee": 0.0}
HEAVY_HEAD = tuple(2.0 if stage == 7 else 1.0 for stage in range(8))


def whole(setting):
    return pytest.param(setting, marks=pytest.mark.all)


# ranks, micro-batches, (f, i, w, F&B, hop), seconds of reduction, layers
SETTINGS = [
    (8, 16, (1, 1, 1, 3, 0), FREE, 64),
    whole((4, 16, (1, 1, 1, 2.25, 0.1), FREE, 64)),
    (4, 16, (1, 1, 1, 2.25, 0), SLOW_TWINS, 64),
    (8, 16, (1, 1, 1, 2.25, 0), FREE, 12),
    (8, 4, (1, 1.3, 0.7, 3, 0), FREE, 64),
    whole((8, 9, (1, 0.8, 1.2, 2.4, 0.05), FREE, 64)),
    (7, 20, (1, 1, 1, 2.25, 0), FREE, 64),
    (4, 12, (1, 2, 0, 3, 0), FREE, 64),
    whole((4, 12, (0.01, 0.02, 0.01, 0.035, 0.004), FREE, 64)),
    (2, 1, (1, 1, 1, 3, 0.2), FREE, 64),
    whole((4, 20, (1, 1, 1, 3, 0.5), SLOW_TWINS, 64)),
    (8, 12, (HEAVY_HEAD, HEAVY_HEAD, HEAVY_HEAD, None, 0.1), FREE, 64),
    (6, 14, (1, 1.1, 0.9, 2, 0.3), {"linear": 1.0, "bidirectional": 2.0, "vee": 1.0}, 6),
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_simulated_best_is_taken(setting):
    ranks, micros, (f, i, w, fb, comm), reduction, layers = setting
    costs = CostModel(f, i, w, fb, comm)
    measured = Measurement(costs, ranks, layers, reduction)
    config, _ = choose(DualPipeConfig(schedule="auto"), measured, micros)
    steps = {}
    for schedule, known in tried(None):
        stages = known.stages_per_rank
        try:
            placement = known.on(ranks)
            assert placement.num_stages <= layers
            placed = costs.for_placement(placement)
            plan = make_plan(schedule, ranks, micros, placed, optimize=True, stages_per_rank=stages)
        except (PlanError, AssertionError):
            continue
        steps[schedule, stages] = simulate(plan, placed).makespan + reduction.get(placement.key, 0.0)
    assert steps[config.schedule, config.stages_per_rank] == min(steps.values())


def test_reduction_and_layers_change_the_choice():
    costs = CostModel(1, 1, 1, 2.25)

    def taken(reduction=FREE, layers=64):
        return choose(DualPipeConfig(schedule="auto"), Measurement(costs, 8, layers, reduction), 32)[0].schedule

    assert taken() == "dualpipe"
    assert taken(SLOW_TWINS) != "dualpipe"
    assert taken(SLOW_TWINS, layers=12) == "zb1p"


def test_memory_bounds_the_choice():
    costs = CostModel(1, 1, 1, 2.25, activation_bytes=10)
    state = {"linear": 100, "bidirectional": 200, "vee": 100, "loop of 2": 100, "loop of 4": 100}

    def rows(memory):
        measured = Measurement(costs, 8, 64, state_bytes=state, memory_bytes=memory)
        return choose(DualPipeConfig(schedule="auto"), measured, 32)

    config, found = rows(10_000)
    assert config.schedule == "dualpipe" and config.activation_cap is None
    assert {row.schedule: row.memory for row in found}["dualpipe"] == 200 + 9 * 10
    config, found = rows(190)
    by_name = {row.schedule: row for row in found}
    assert config.schedule != "dualpipe" and "190 B are free" in by_name["dualpipe"].reason
    assert all(row.memory <= 190 for row in found if row.feasible)
    with pytest.raises(PlanError, match="no schedule is feasible"):
        rows(105)


def test_auto_measures_once_and_trains_as_the_schedule_it_took(ranks, tmp_path, capsys):
    path = tmp_path / "costs.json"
    first = ranks.run(4, auto_runs.start, path=path)
    assert {rank["measured"] for rank in first} == {1}
    assert len({rank["digest"] for rank in first}) == 1
    measured = Measurement.load(path)
    assert measured.ranks == 4 and len(measured.costs.f) == 4
    assert all(seconds > 0 for seconds in (*measured.costs.f, *measured.costs.i, *measured.costs.w))
    assert measured.costs.comm > 0 and min(measured.costs.activation_bytes) > 0
    assert min(measured.costs.copy) > 0 and len(measured.costs.pending_bytes) == 4
    assert measured.reduction["linear"] == 0 < measured.reduction["bidirectional"]
    layers = measured.of_layers
    assert layers.bounds[-1] == len(layers.seconds) == len(layers.params) and min(layers.seconds) > 0
    assert sum(layers.params) > 0 and max(layers.kept) > 0
    assert measured.state_bytes.keys() == measured.reduction.keys() >= {"linear", "vee", "loop of 2", "loop of 3"}

    second = ranks.run(4, auto_runs.start, path=path, data=False)
    assert {rank["measured"] for rank in second} == {0}
    assert second[0]["digest"] == first[0]["digest"] and second[0]["losses"] == first[0]["losses"]
    taken, _ = choose(DualPipeConfig(schedule="auto"), measured, 4)
    assert taken.schedule == first[0]["schedule"]
    same = {key: getattr(taken, key) for key in ("schedule", "stages_per_rank", "partition_method")}
    fixed = ranks.run(4, auto_runs.start, path=path, data=False, **same)
    assert fixed[0]["digest"] == first[0]["digest"] and fixed[0]["losses"] == first[0]["losses"]

    assert main(["compare", "--costs", str(path), "--micro-batches", "4", "--optimize"]) == 0
    marked = [line for line in capsys.readouterr().out.splitlines() if "> " in line]
    assert first[0]["schedule"] in marked[0]


def test_what_does_not_fit_goes_to_host_memory(ranks, tmp_path):
    path = tmp_path / "costs.json"
    job = ranks.run(2, auto_runs.described, path=path, ranks=2)[0]
    states = {"linear": 100, "bidirectional": 300, "vee": 100, "loop of 2": 100}
    costs = CostModel(1, 1, 1, activation_bytes=10)
    tight = Measurement(costs, 2, 4, state_bytes=states, memory_bytes=116, job=job)
    config, rungs = choose(DualPipeConfig(schedule="auto"), tight, 4)
    assert config.offload_activations and min(rung.plain.memory for rung in rungs if rung.plain) > 116
    tight.save(path)
    found = ranks.run(2, auto_runs.start, path=path, ranks=2, data=False)
    assert all(rank["schedule"] == config.schedule and rank["copies"] for rank in found)
    same = {"schedule": config.schedule, "activation_cap": config.activation_cap}
    plain = ranks.run(2, auto_runs.start, path=path, ranks=2, data=False, **same)
    assert not plain[0]["copies"] and plain[0]["losses"] == found[0]["losses"]
    stays = DualPipeConfig(schedule="auto", offload_activations=False)
    for asked, may in ((stays, True), (DualPipeConfig(schedule="auto"), False)):
        assert choose(asked, tight, 4, may)[0].offload_activations is False


def test_the_faster_cut_is_trained(ranks, tmp_path):
    """Layers of known seconds, those of the last stage twice as long; the engine cuts as it would by hand."""
    path = tmp_path / "costs.json"
    job = ranks.run(2, auto_runs.described, path=path, ranks=2)[0]
    times = (4.0, 8.0)
    layers = LayerCosts((0, 4, 8), (1.0,) * 4 + (2.0,) * 4, (1,) * 8, (1,) * 8, (False,) * 8)
    costs, mirrored = CostModel(times, times, times, comm=0.01), {"bidirectional": 100.0}
    measured = Measurement(costs, 2, 3, mirrored, job=job, of_layers=layers)  # one stage a rank
    config, rows = choose(DualPipeConfig(schedule="auto"), measured, 4)
    best = best_of(rows)
    assert config.partition_method == best.counts and best.total < 0.9 * best.plain.total
    stays, _ = choose(DualPipeConfig(schedule="auto", partition_method="uniform"), measured, 4)
    assert stays.partition_method == "uniform"
    measured.save(path)
    found = ranks.run(2, auto_runs.start, path=path, ranks=2, data=False)
    assert all(rank["schedule"] == config.schedule and rank["measured"] == 0 for rank in found)
    same = {key: getattr(config, key) for key in ("schedule", "stages_per_rank", "partition_method")}
    by_hand = ranks.run(2, auto_runs.start, path=path, ranks=2, data=False, **same)
    assert [rank["losses"] for rank in by_hand] == [rank["losses"] for rank in found]
    assert [rank["layers"] for rank in by_hand] == [rank["layers"] for rank in found]
    assert {rank["digest"] for rank in by_hand} == {rank["digest"] for rank in found}, "planned for the same costs"
    assert sorted(number for rank in found for number in rank["layers"]) == list(range(8))


def test_auto_with_replicas_and_bf16(ranks, tmp_path):
    path = tmp_path / "costs.json"
    found = ranks.run(4, auto_runs.start, path=path, ranks=2, replicas=2, precision="bf16", optimize=False)
    assert len({rank["digest"] for rank in found}) == 1
    measured = Measurement.load(path)
    assert measured.reduction["linear"] > 0 and measured.job["precision"] == "bf16"


def test_another_job_measures_again_or_says_why_not(ranks, tmp_path):
    path = tmp_path / "costs.json"
    Measurement(CostModel(), 4, 64, job={"model": "another"}).save(path)
    for kwargs, text in (
        ({"data": False}, "training_data"),
        ({"schedule": "dualpipe"}, "measured on another job"),
        ({"schedule": "dualpipe", "path": tmp_path / "none.json"}, "there is no file"),
    ):
        with pytest.raises(RankError) as caught:
            ranks.run(2, auto_runs.start, timeout=60, **{"path": path, "ranks": 2, **kwargs})
        assert {error[0] for error in caught.value.errors.values()} == {"ConfigError"}
        assert all(text in error[1] for error in caught.value.errors.values())
    found = ranks.run(2, auto_runs.start, path=path, ranks=2, optimize=False)
    assert {rank["measured"] for rank in found} == {1}
