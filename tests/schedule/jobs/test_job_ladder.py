from dataclasses import replace
from itertools import accumulate

import pytest

from dualpipe_engine.schedule.jobs.checkpointed import Keeping
from dualpipe_engine.schedule.jobs.hardware import Hardware, load_hardware
from dualpipe_engine.schedule.jobs.job import Job, make_job
from dualpipe_engine.schedule.jobs.ladder import (
    PLAIN,
    WHOLE,
    Ladder,
    Work,
    chosen,
    climb,
    repeated_seconds,
)
from dualpipe_engine.schedule.jobs.model_shape import load_shape, shape_of
from dualpipe_engine.schedule.jobs.stage_times import (
    job_bounds,
    job_cuts,
    layer_seconds,
    reduction_seconds,
    stage_costs,
)
from dualpipe_engine.schedule.orders.registry import KNOWN, tried
from dualpipe_engine.schedule.placement import LINEAR, Placement
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.simulate import makespan_of
from dualpipe_engine.viz.ladder import ladder_data, reason

H100 = load_hardware("h100")
DENSE = {
    "hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 8, "intermediate_size": 4096,
    "vocab_size": 500,
}  # fmt: skip
SMALL = shape_of("small", DENSE)
V3 = load_shape("deepseek-v3", own=True)
ROOM = 1e15


def small(memory: float = ROOM, hardware: Hardware = H100, model=SMALL) -> Work:
    return Work(model, Job(4, 4, 1, 8, fp8=False), hardware, memory)


def ladder(name: str, work: Work) -> Ladder:
    return Ladder(work, name, KNOWN[name])


def on(found: Ladder, label: str, away=False, split=None):
    """The outcome on a rung."""
    return next(
        each
        for each in found.outcomes
        if each.rung.label == label and (each.away is not False) == away and each.split is split
    )


def test_rungs_are_the_names_that_the_model_has():
    assert [rung.label for rung in small().rungs] == ["-", "norms", "norms, activation functions", "whole layers"]
    own = Work(V3, make_job(V3, 2048), load_hardware("h800"), ROOM, own=True)
    assert own.rungs[3].label == "norms, activation functions, up-projections"
    assert own.rungs[3].names[:2] == ("norm", "activation") and own.rungs[-1] == WHOLE


def test_what_fits_as_it_is_stays_as_it_is():
    found = ladder("1f1b", small())
    assert found.cheapest == found.plain and found.plain.rung == PLAIN and found.plain.away is False
    assert len(found.outcomes) == len(small().rungs), "nothing has to leave"


def test_each_rung_saves_bytes_and_costs_seconds():
    outcomes = ladder("1f1b", small()).outcomes
    assert sorted(outcomes, key=lambda each: each.step) == outcomes
    assert sorted(outcomes, key=lambda each: -each.memory) == outcomes
    assert len({each.memory for each in outcomes}) == len({each.step for each in outcomes}) == len(outcomes)


def test_the_cheapest_is_the_fastest_of_all_that_fit():
    """At each limit, also those between rungs, where offload decides; the search may stop early, this does not."""
    sizes = sorted(each.memory for name in ("1f1b", "zb1p") for each in ladder(name, small()).outcomes)
    for limit in sorted({*sizes, *(size - 1 for size in sizes)})[::2]:
        for name in ("1f1b", "zb1p"):
            found = ladder(name, small(limit))
            steps = [each.step for each in found.outcomes if each.memory <= limit]
            assert (found.cheapest.step if found.cheapest else None) == min(steps, default=None)
            assert all(each.fits == (each.memory <= limit) for each in found.outcomes)


def test_offload_is_the_smallest_number_that_fits_and_copies_take_time():
    plain = ladder("interleaved", small()).plain
    free = ladder("interleaved", small(plain.memory - 1, replace(H100, pcie=1e15)))
    paid = ladder("interleaved", small(plain.memory - 1))
    assert on(free, "-", away=True).away == 1 and on(free, "-", away=True).step == pytest.approx(plain.step)
    assert on(paid, "-", away=True).step > 1.1 * plain.step


def test_full_backwards_keep_nothing_for_w():
    found = ladder("zb1p", small())
    assert on(found, "whole layers", split=False).memory < on(found, "whole layers", split=True).memory
    assert on(found, "-", split=False).step > on(found, "-", split=True).step


def test_nothing_fits_into_less_than_the_weights():
    found = list(climb(replace(small(1e6), job=Job(2, 2, 1, 2, fp8=False)), 2))
    assert chosen(found) is None and all(each.cheapest is None for each in found)
    assert all(each.least.memory == min(outcome.memory for outcome in each.outcomes) for each in found)


def test_the_chosen_one_is_the_fastest_and_what_has_no_plan_says_why():
    found = list(climb(replace(small(), job=Job(3, 3, 1, 4, fp8=False)), 2))
    assert [each.schedule for each in found if each.reason] == ["dualpipe"], "it needs an even number of ranks"
    steps = [each.cheapest.step for each in found if not each.reason]
    assert chosen(found).cheapest.step == min(steps)


def test_a_faster_cut_than_that_of_equal_work_is_tried():
    """Each cut is planned by hand: 17 blocks and a large projection on 8 stages."""
    model = shape_of("uneven", DENSE | {"num_hidden_layers": 17, "vocab_size": 30_000})
    found = ladder("dualpipev", small(model=model))
    job, placement = found.work.job, KNOWN["dualpipev"].on(4)
    steps = {}
    for bounds in job_cuts(model, placement, job, H100):
        costs = stage_costs(model, bounds, job, H100)
        plan = make_plan("dualpipev", 4, job.micro_batches, costs, optimize=True)
        steps[bounds] = makespan_of(plan, costs) + reduction_seconds(model, bounds, placement, job, H100)
    equal, best = next(iter(steps)), min(steps, key=steps.get)
    assert best != equal and found.cheapest.step == steps[best] < steps[equal] == found.plain.step
    assert found.cheapest.bounds == best and found.plain.bounds is None
    assert reason([found], found.work).startswith("dualpipev, another cut: ")
    method = ladder_data([found], found.work)["schedules"][0]["cheapest"]["partition_method"]
    assert (0, *accumulate(map(int, method.split(",")))) == best


def test_stages_a_rank_are_tried_where_a_schedule_takes_any():
    found = [(name, each.stages_per_rank) for name, each in tried(None) if name.startswith("interleaved")]
    assert found == [("interleaved", 2), ("interleaved", 4), ("interleaved_zb", 2), ("interleaved_zb", 4)]
    assert {each.stages_per_rank for _, each in tried(3)} == {None, 3}


def test_what_is_computed_again_is_added_to_the_backward_and_no_transfer_is():
    work = Work(V3, make_job(V3, 2048), load_hardware("h800"), ROOM, own=True)
    moe = V3.layers[10]
    whole, up = (repeated_seconds(moe, rung, work) for rung in (WHOLE, work.rungs[3]))
    assert whole == layer_seconds(moe, work.job, work.hardware).f and 0 < up < whole
    bounds = job_bounds(V3, Placement(LINEAR, 16), work.job, work.hardware)
    shape = V3, bounds, work.job, work.hardware
    again = [repeated_seconds(layer, WHOLE, work) for layer in V3.layers]
    plain, repeated = stage_costs(*shape), stage_costs(*shape, again)
    assert repeated.f == plain.f and repeated.w == plain.w
    comm = sum(layer_seconds(layer, work.job, work.hardware).comm for layer in V3.layers)
    assert sum(repeated.i) - sum(plain.i) == pytest.approx(sum(plain.f) - comm)


def test_up_projections_cost_their_products():
    """The two that lead from a latent of 512 and 1,536 to 128 heads."""
    flow = V3.layers[10].flow(2)
    products, moved = flow.repeated((r"attention\.(expand|query\.2)",), 2)
    assert products == 512 * 128 * 256 + 1536 * 128 * 192
    assert moved == 2 * (128 * 256 + 128 * 192 + 512 + 1536), "outputs are written, the normed latents read"
    assert flow.repeated((), 2) == (0, 0)


def test_of_a_whole_layer_its_input_is_kept_and_what_transfers_deliver():
    whole = Keeping(2, interval=1)
    dense, moe = V3.layers[1], V3.layers[10]
    assert whole.of_stage(V3, [dense]) == 2 * 7168
    assert whole.of_stage(V3, [moe]) == 2 * 7168 * (1 + 2 * 8 + 3)
    assert whole.of_stage(V3, [dense, moe]) == 2 * 7168 * (2 + 2 * 8 + 3)
    assert whole.of_stage(V3, V3.layers[:1]) == 0, "an embedding keeps tokens"


def test_the_reason_names_what_is_changed_what_it_costs_and_what_is_next():
    work = replace(small(), job=Job(4, 4, 1, 4, fp8=False))
    work = replace(work, memory=ladder("vmin", work).plain.memory)
    found = list(climb(work, 2))
    text, best = reason(found, work), chosen(found)
    assert text.startswith(best.schedule) and f"{best.cheapest.step:.2f} s" in text and "next is" in text
    data = ladder_data(found, work)
    assert [each["schedule"] for each in data["schedules"] if each["chosen"]] == [best.schedule]
    assert data["reason"] == text and len(data["rungs"]) == len(best.outcomes)
    none = small(1e6)
    assert reason([ladder("1f1b", none)], none).startswith(
        "nothing fits into 0.001 GB: the least is 1f1b, whole layers"
    )
