from dataclasses import replace

import pytest

from dualpipe_engine.errors import ConfigError
from dualpipe_engine.schedule.jobs.estimate import (
    PUBLISHED_HOURS,
    estimate,
    layer_seconds,
    make_job,
    stage_costs,
    state_bytes,
)
from dualpipe_engine.schedule.jobs.hardware import load_hardware
from dualpipe_engine.schedule.jobs.model_shape import load_shape
from dualpipe_engine.schedule.placement import BIDIRECTIONAL, LINEAR, Placement

V3, H800 = load_shape("deepseek-v3"), load_hardware("h800")


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
    free = replace(H800, network=1e15)
    rows = by_name(estimate(V3, make_job(V3, 2048), free))
    assert rows["dualpipe"].step > 0.9 * rows["zbv"].step


def test_the_mirror_costs_weights_and_gradients_but_no_optimizer_state():
    job = make_job(V3, 2048)
    one, _ = state_bytes(V3, Placement(LINEAR, 16), job, H800)
    two, _ = state_bytes(V3, Placement(BIDIRECTIONAL, 16), job, H800)
    assert 1.5 * one < two < 2 * one


def test_a_layer_costs_its_flops():
    job = make_job(V3, 2048)
    moe = layer_seconds(V3.layers[10], job, H800)
    doubled = layer_seconds(V3.layers[10], replace(job, sequences=2), H800)
    assert doubled.f == pytest.approx(2 * moe.f) and doubled.comm == pytest.approx(2 * moe.comm)
    assert layer_seconds(V3.layers[10], replace(job, fp8=False), H800).w > moe.w
    assert layer_seconds(V3.layers[1], job, H800).comm == 0
    costs = stage_costs(V3, Placement(LINEAR, 16), job, H800)
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
