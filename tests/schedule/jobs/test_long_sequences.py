"""Long sequences in estimates: attention's quadratic cost, and what ranks that share sequences exchange and hold."""

import json
from dataclasses import replace

import pytest

from dualpipe_engine.cli.main import main
from dualpipe_engine.errors import ConfigError
from dualpipe_engine.schedule.jobs.checkpointed import Keeping
from dualpipe_engine.schedule.jobs.estimate import estimate
from dualpipe_engine.schedule.jobs.hardware import load_hardware
from dualpipe_engine.schedule.jobs.job import Job, check_heads, make_job
from dualpipe_engine.schedule.jobs.ladder import WHOLE, Work, repeated_seconds
from dualpipe_engine.schedule.jobs.memory import training_of
from dualpipe_engine.schedule.jobs.model_memory import Shape, model_memory
from dualpipe_engine.schedule.jobs.model_shape import load_shape
from dualpipe_engine.schedule.jobs.stage_times import heads_bytes, job_bounds, layer_seconds, stage_costs
from dualpipe_engine.schedule.orders.registry import STOCK
from dualpipe_engine.schedule.placement import LINEAR, Placement

H100 = load_hardware("h100")
LENGTH = 131072
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 1}}


def job_of(shared, length=LENGTH, experts=1):
    return Job(256, 8, experts, 16, length=length, fp8=False, sequence_parallel=shared)


@pytest.mark.parametrize(
    ("model", "own", "shared", "elements"),
    [
        # 64 heads of queries and 8 of keys and of values, 128 wide; back come 64.
        ("llama-3-70b", True, 8, (64 + 8 + 8 + 64) * 128),
        ("llama-3-70b", False, 8, (64 + 8 + 8 + 64) * 128),
        ("llama-3-70b", True, 16, (64 + 16 + 16 + 64) * 128),  # each rank has a head of keys and values
        # 128 heads of queries, 128 + 64 wide, and of keys and values, 128 + 128; one rotary key for each rank.
        ("deepseek-v3", True, 8, 128 * (192 + 256 + 128) + 8 * 64),
        ("deepseek-v3", False, 8, 128 * (192 + 192 + 128 + 128)),  # keys have it already
    ],
)
def test_what_leaves_a_rank_or_a_node(model, own, shared, elements):
    shape, job = load_shape(model, own, shared), job_of(shared)
    layer = shape.layers[20]
    assert layer.exchanged == elements
    away = 7 / 8 if shared == 8 else 1 / 2  # to seven others of the node; to the other one of two nodes
    size = 2 * elements * away * LENGTH / shared
    assert heads_bytes(layer, job, H100) == pytest.approx(size)
    link = 450e9 if shared == 8 else 50e9
    assert layer_seconds(layer, job, H100).heads == pytest.approx(size / (0.9 * link))
    assert layer_seconds(shape.layers[0], job, H100).heads == 0


def test_attention_grows_with_the_square_of_the_length():
    """Of the causal core 2 x 2 x 64 heads x 128 for each pair of tokens, of which there are half as many as all."""
    layer = load_shape("llama-3-70b", True, 8).layers[5]
    rate = H100.bf16 * H100.attention_efficiency * (1 - 20 / 132)
    short, long = (layer_seconds(layer, job_of(8, length), H100) for length in (4096, LENGTH))
    cores = [2 * 2 * 64 * 128 * length / 2 * length / 8 / rate for length in (4096, LENGTH)]
    assert long.f - 32 * short.f == pytest.approx(cores[1] - 32 * cores[0])
    assert long.i - 32 * short.i == pytest.approx(2.5 * (cores[1] - 32 * cores[0]))
    assert long.w == pytest.approx(32 * short.w) and long.heads == pytest.approx(32 * short.heads)


def test_ranks_that_share_a_sequence_divide_its_work():
    """But for what they exchange, and for the SMs that it takes."""
    alone, together = (load_shape("llama-3-70b", True, shared).layers[5] for shared in (1, 8))
    whole, part = layer_seconds(alone, job_of(1), H100), layer_seconds(together, job_of(8), H100)
    assert whole.heads == 0 and part.w == pytest.approx(whole.w / 8 / (1 - 20 / 132))


def costs_of(model, job, hardware, whole=False):
    bounds = job_bounds(model, Placement(LINEAR, 8), job, hardware)
    return stage_costs(model, bounds, job, hardware, whole=whole)


def test_pairs_hide_the_exchanges_of_layers_that_offer_them():
    """Layers of transformers that are computed again as a whole offer none."""
    job = job_of(8, 8192)
    ours, theirs = (costs_of(load_shape("llama-3-70b", own, 8), job, H100) for own in (True, False))
    assert ours.f == theirs.f and ours.fb == theirs.fb
    ours, theirs = (costs_of(load_shape("llama-3-70b", own, 8), job, H100, True) for own in (True, False))
    assert ours.f == theirs.f and ours.i == theirs.i
    waited = 10 * 2 * layer_seconds(load_shape("llama-3-70b", True, 8).layers[5], job, H100).heads
    assert theirs.fb[3] - ours.fb[3] == pytest.approx(waited)  # ten of 80 blocks
    slow = replace(H100, nvlink=1e9, pair_efficiency=1.0)
    costs = costs_of(load_shape("llama-3-70b", True, 8), job, slow)
    assert costs.fb[3] == pytest.approx(
        20 * layer_seconds(load_shape("llama-3-70b", True, 8).layers[5], job, slow).heads
    )


def test_whole_layers_repeat_the_exchanges_or_keep_what_they_deliver():
    job = job_of(8)
    for own in (True, False):
        shape = load_shape("llama-3-70b", own, 8)
        work, layer = Work(shape, job, H100, 80e9, own), shape.layers[5]
        kept, seconds = Keeping(2, interval=1).of_stage(shape, [layer]), layer_seconds(layer, job, H100)
        assert kept == 2 * (8192 + (layer.exchanged if own else 0)) < Keeping(2).of_stage(shape, [layer])
        assert repeated_seconds(layer, WHOLE, work) == pytest.approx(seconds.f + (0 if own else seconds.heads))


def test_batches_keep_the_published_tokens_and_multi_token_prediction_is_left_out():
    """The report has 480 sequences at 128K: 30 for each of 16 groups of 8 replicas."""
    shape = load_shape("deepseek-v3", True, 8)
    assert [layer.name for layer in shape.layers[-2:]] == ["moe", "head"]
    job = make_job(shape, 2048, length=LENGTH)
    assert (job.micro_batches, job.tokens, job.step_tokens) == (30, LENGTH // 8, 480 * LENGTH)
    assert {row.reason for row in estimate(shape, job, load_hardware("h800"))} == {""}


@pytest.mark.parametrize(
    ("shared", "length", "reason"),
    [(3, 3 * 4096, "multiple of 3; choose --sequence-parallel"), (8, 100, "100 tokens cannot be cut into 8 parts")],
)
def test_parts_that_do_not_fit_name_the_option(shared, length, reason):
    with pytest.raises(ConfigError, match=reason):
        job_of(shared, length)
    with pytest.raises(ConfigError, match=reason):
        Shape(8, 16, 32, length=length, sequence_parallel=shared)


@pytest.mark.parametrize(("shared", "fits"), [(16, True), (4, True), (24, False), (128, False)])
def test_heads_that_cannot_be_divided(shared, fits):
    shape = load_shape("llama-3-70b", True, shared)
    if fits:
        check_heads(shape)
    else:
        with pytest.raises(ConfigError, match="64 heads of queries and 8 of keys and values: choose --sequence-par"):
            check_heads(shape)


def test_bytes_are_those_of_a_part():
    """Of 8 replicas that share, each has an eighth; stock DeepSpeed has no such thing."""
    shapes = [Shape(8, 16, 8, length=LENGTH, sequence_parallel=shared) for shared in (1, 8)]
    whole, parts = (
        {row.schedule: row for row in model_memory(load_shape("llama-3-70b", True, shape.sequence_parallel),
                                                   training_of(BF16), shape)}
        for shape in shapes
    )  # fmt: skip
    assert not parts[STOCK].ranks and "shares no sequences" in parts[STOCK].reason
    for name in parts.keys() - {STOCK}:
        for one, other in zip(whole[name].ranks, parts[name].ranks, strict=True):
            assert one.optimizer == other.optimizer and one.weights == other.weights
            assert other.activations == pytest.approx(one.activations / 8, rel=0.05)  # and angles of all positions


def test_the_commands_know_lengths_and_parts(tmp_path, capsys):
    base = ["compare", "--model", "llama-3-70b", "--gpus", "128", "--ranks", "4", "--micro-batches", "8", "--no-fp8"]
    slow, steps = tmp_path / "slow.json", []
    slow.write_text(json.dumps({"like": "h100", "network": 5e9}))
    base += ["--hardware", str(slow)]
    for more in ([], ["--own-layers"]):
        assert main([*base, "--length", "16384", "--sequence-parallel", "16", *more, "--format", "json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["job"]["length"], found["job"]["sequence_parallel"]) == (16384, 16)
        steps.append({row["schedule"]: row["step"] for row in found["schedules"]})
    assert steps[1] == steps[0]  # layers of either kind offer their exchanges as phases
    assert main([*base, "--sequence-parallel", "8"]) == 0
    assert "heads are exchanged in bf16, hidden in F&B pairs" in capsys.readouterr().out
    for parts in ("0", "-1"):
        with pytest.raises(SystemExit):
            main([*base, "--sequence-parallel", parts])
        assert "--sequence-parallel" in capsys.readouterr().err
    assert main(["compare", "--ranks", "8", "--micro-batches", "16", "--sequence-parallel", "8"]) == 2
    assert "--sequence-parallel" in capsys.readouterr().err

    config = tmp_path / "ds.json"
    found = []
    for text, more in ((BF16 | {"sequence_parallel_size": 8}, []), (BF16, ["--sequence-parallel", "8"])):
        config.write_text(json.dumps(text | {"gradient_accumulation_steps": 16}))
        base = ["memory", "--config", str(config), "--ranks", "8"]
        model = ["--replicas", "8", "--model", "llama-3-70b", "--length", str(LENGTH)]
        assert main([*base, *model, *more, "--format", "json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert main([*base, "--params-per-stage", "1e9", "--sequence-parallel", "8"]) == 2
    assert "--sequence-parallel" in capsys.readouterr().err
