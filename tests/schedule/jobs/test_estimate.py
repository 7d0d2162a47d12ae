import random
from dataclasses import replace

import pytest

from dualpipe_engine.errors import ConfigError
from dualpipe_engine.schedule.jobs.estimate import estimate
from dualpipe_engine.schedule.jobs.hardware import load_hardware
from dualpipe_engine.schedule.jobs.job import PUBLISHED_HOURS, Job, make_job
from dualpipe_engine.schedule.jobs.ladder import Ladder, Work
from dualpipe_engine.schedule.jobs.model_memory import fullest
from dualpipe_engine.schedule.jobs.model_shape import KNOWN, load_shape, shape_of
from dualpipe_engine.schedule.jobs.stage_times import (
    all_to_all_bytes,
    cut_model,
    job_bounds,
    layer_seconds,
    stage_costs,
)
from dualpipe_engine.schedule.orders.registry import KNOWN as SCHEDULES
from dualpipe_engine.schedule.placement import BIDIRECTIONAL, LINEAR, VEE, Placement

V3, H800 = load_shape("deepseek-v3"), load_hardware("h800")
PLAIN = shape_of("without MTP", KNOWN["deepseek-v3"] | {"num_nextn_predict_layers": 0})
JOB = Job(2048, 16, 64, 120)


def by_name(rows):
    return {row.schedule: row for row in rows}


@pytest.fixture(scope="module")
def published():
    return by_name(estimate(V3, make_job(V3, 2048), H800))


def test_deepseek_v3_takes_the_published_gpu_hours(published):
    hours = PUBLISHED_HOURS["deepseek-v3", "h800"]
    assert published["dualpipe"].gpu_hours == pytest.approx(hours, rel=0.15)


def test_hidden_all_to_all_is_what_makes_pairs_faster(published):
    assert published["dualpipe"].step < 0.8 * published["1f1b"].step
    rows = by_name(estimate(PLAIN, replace(JOB, micro_batches=40), replace(H800, network=1e15)))
    assert rows["dualpipe"].step > 0.9 * rows["zbv"].step


def state(model, placement, job, hardware=H800):
    """Bytes of the fullest rank without activations."""
    return fullest(model, job_bounds(model, placement, job, hardware), placement, job, [0] * placement.num_ranks)


def test_bytes_are_those_of_the_ladder_as_it_is(published):
    job = make_job(V3, 2048)
    for name in ("1f1b", "dualpipe"):
        plain = Ladder(Work(V3, job, H800, 80e9), name, SCHEDULES[name]).plain
        assert (published[name].memory, published[name].step) == (plain.memory, pytest.approx(plain.step))


def test_the_mirror_costs_weights_and_gradients_but_no_optimizer_state():
    one, two = (state(PLAIN, Placement(name, 16), JOB) for name in (LINEAR, BIDIRECTIONAL))
    assert 1.5 * one < two < 2 * one


def test_experts_are_divided_by_the_ranks_that_share_them():
    """Weights, gradients and the part of the optimizer that the copies of a share divide among them."""
    moe = PLAIN.layers[10]
    one = replace(PLAIN, layers=(moe,))
    for experts in (1, 8, 64):
        job = Job(128, 1, experts, 8, fp8=False)
        routed = moe.experts / experts
        wanted = 6 * (moe.params + routed) + 12 * (moe.params / 128 + routed * experts / 128)
        assert state(one, Placement(LINEAR, 1), job) == pytest.approx(wanted)
    times = [layer_seconds(moe, Job(128, 1, experts, 8), replace(H800, imbalance=1.0)) for experts in (1, 8)]
    assert times[0].w == pytest.approx(times[1].w), "as many tokens come as go"


def test_layers_that_predict_further_tokens_are_cut_with_the_head():
    weights = [1.0] * len(V3.layers)
    for placement in (Placement(BIDIRECTIONAL, 16), Placement(VEE, 16)):
        last = V3.layers[cut_model(V3, placement, weights)[-2] :]
        assert [layer.name for layer in last][-4:] == ["norm", "ahead", "mtp", "head"]
    plain, head = (shape.layers[-1] for shape in (PLAIN, V3))
    assert head.dense == 2 * plain.dense and head.params == plain.params - V3.hidden


@pytest.mark.parametrize(
    ("experts", "deep_ep", "copies"),
    [(64, True, 4 * 7 / 8), (64, False, 8 * 7 / 8), (8, False, 8 * 7 / 8), (2, False, 8 / 2), (2, True, 1 - 1 / 2**8)],
)
def test_what_leaves_a_node_or_inside_of_one_a_rank(experts, deep_ep, copies):
    job = Job(128, 1, experts, 8, fp8=False, deep_ep=deep_ep)
    moe = PLAIN.layers[10]
    assert all_to_all_bytes(moe, job, H800) == pytest.approx(7168 * 4 * 4096 * copies)
    comm = layer_seconds(moe, job, H800).comm
    assert comm == pytest.approx(7168 * 4 * 4096 * copies / ((H800.network if experts > 8 else H800.nvlink) * 0.9))


def test_a_token_goes_to_fewer_ranks_than_experts():
    """Without groups of experts: the mean over random choices."""
    moe = load_shape("qwen3-235b-a22b").layers[10]
    draw = random.Random(0)
    choices = [{expert * 4 // 128 for expert in draw.sample(range(128), 8)} - {0} for _ in range(4000)]
    mean = sum(map(len, choices)) / len(choices)
    found = all_to_all_bytes(moe, Job(4, 1, 4, 8, length=1, fp8=False), H800) / (4096 * 4)
    assert found == pytest.approx(mean, rel=0.03)


def test_a_layer_costs_its_flops():
    job = make_job(V3, 2048)
    moe = layer_seconds(V3.layers[10], job, H800)
    doubled = layer_seconds(V3.layers[10], replace(job, sequences=2), H800)
    assert doubled.f == pytest.approx(2 * moe.f) and doubled.comm == pytest.approx(2 * moe.comm)
    assert layer_seconds(V3.layers[10], replace(job, fp8=False), H800).w > moe.w
    assert layer_seconds(V3.layers[1], job, H800).comm == 0
    costs = stage_costs(V3, job_bounds(V3, Placement(LINEAR, 16), job, H800), job, H800)
    assert max(costs.fb) >= max(costs.w)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [({"gpus": 100}, "--ranks"), ({"gpus": 2048, "experts": 48}, "--expert-parallel"), ({"gpus": 0}, "at least 1")],
)
def test_counts_that_do_not_fit_name_the_option(arguments, reason):
    with pytest.raises(ConfigError, match=reason):
        make_job(V3, **arguments)


def test_models_without_a_published_job_need_the_counts():
    with pytest.raises(ConfigError, match="--ranks"):
        make_job(load_shape("llama-3-70b"), 64)
    with pytest.raises(ConfigError, match="--micro-batches"):
        make_job(load_shape("llama-3-70b"), 64, ranks=8)


def test_the_default_of_ranks_that_share_experts_divides_both():
    shape = shape_of("six", KNOWN["mixtral-8x7b"] | {"num_local_experts": 6})
    assert make_job(shape, 64, ranks=8, micro_batches=8).experts == 2
    with pytest.raises(ConfigError, match="4 ranks cannot share 6 experts"):
        make_job(shape, 64, ranks=8, experts=4, micro_batches=8)


def test_models_without_experts_have_none_to_share():
    with pytest.raises(ConfigError, match="leave --expert-parallel out"):
        make_job(load_shape("llama-3-70b"), 64, ranks=8, experts=2, micro_batches=8)
