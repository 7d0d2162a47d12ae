"""What a user can get wrong: one clear sentence on every rank, and nothing hangs."""

from __future__ import annotations

import pytest
import training
from ranks import RankError

from dualpipe_engine.engine.config import micro_batches, read_config
from dualpipe_engine.errors import ConfigError


def without_fit(config):
    config["train_batch_size"] = 15
    return config


def offloaded(zero, what, device):
    config = training.settings(4, zero=zero, schedule="dualpipe")
    config["zero_optimization"][f"offload_{what}"] = {"device": device, "nvme_path": "nowhere"}
    return config


CASES = {
    "unknown key": (4, 8, training.settings(4, schedule="dualpipe", optimise=True), 'did you mean "optimize"'),
    "unknown schedule": (4, 8, training.settings(4, schedule="dualpip"), 'did you mean "dualpipe"'),
    "odd ranks": (3, 8, training.settings(4, schedule="dualpipe"), "dualpipev"),
    "few layers": (4, 0, training.settings(4, schedule="dualpipev"), "4 layers cannot fill 8 pipeline stages"),
    "batch sizes": (4, 8, without_fit(training.settings(4, schedule="dualpipe")), "batch sizes do not fit"),
    "zero 3": (4, 8, training.settings(4, zero=3, schedule="dualpipe"), "ZeRO-3 cannot work with a pipeline"),
    "zero 2 and Muon": (
        4,
        8,
        training.settings(4, zero=2, schedule="dualpipe") | {"optimizer": {"type": "Muon"}},
        "whole gradients, which Muon needs",
    ),
    "offload without ZeRO": (4, 8, offloaded(0, "optimizer", "cpu"), '"stage": 1'),
    "optimizer on nvme": (4, 8, offloaded(1, "optimizer", "nvme"), '"offload_optimizer": {"device": "nvme"}'),
    "parameters off the device": (4, 8, offloaded(2, "param", "cpu"), '"offload_param": {"device": "cpu"}'),
    "ZeRO 3 as text": (4, 8, training.settings(4, zero="3", schedule="dualpipe"), "ZeRO-3 cannot work with a pipeline"),
    "old offload without ZeRO": (
        4,
        8,
        training.settings(4, schedule="dualpipe") | {"zero_optimization": {"stage": 0, "cpu_offload": True}},
        '"offload_optimizer" needs partitions of the optimizer state',
    ),
    "misspelt key": (
        4,
        8,
        training.settings(4, schedule="dualpipe") | {"gradient_cliping": 0.5},
        'did you mean "gradient_clipping"',
    ),
    "no section": (
        4,
        8,
        training.settings(4, schedule="dualpipe") | {"tensorboard": True},
        'DeepSpeedMonitorConfig["tensorboard"]: Input should be a valid dictionary',
    ),
    "two precisions": (
        4,
        8,
        training.settings(4, precision="bf16", schedule="dualpipe") | {"fp16": {"enabled": True}},
        "bfloat16 and fp16 modes cannot be simultaneously enabled",
    ),
    "small cap": (4, 8, training.settings(8, schedule="dualpipe", activation_cap=1), "cap"),
    "bad value": (4, 8, training.settings(4, schedule="dualpipe", p2p_timeout_s=-1), "p2p_timeout_s"),
    "loads without experts": (4, 8, training.settings(4, schedule="dualpipe", load_report_steps=2), "there are none"),
    "no plan file": (4, 8, training.settings(4, schedule="nowhere.csv"), "there is no plan file"),
}


@pytest.mark.parametrize("name", CASES)
def test_every_rank_says_the_same_sentence(ranks, name):
    world, blocks, config, text = CASES[name]
    with pytest.raises(RankError) as caught:
        ranks.run(world, training.fails, timeout=60, config=config, ranks=world, blocks=blocks, alike=True)
    errors = caught.value.errors
    assert sorted(errors) == list(range(world))
    assert {error[0] for error in errors.values()} <= {"ConfigError", "PlanError"}
    messages = {error[1] for error in errors.values()}
    assert len(messages) == 1
    assert text in messages.pop()


def test_misspelt_schedule_key_is_found_without_a_schedule():
    with pytest.raises(ConfigError, match='did you mean "schedule"'):
        read_config({"pipeline": {"shedule": "dualpipe"}})


def test_stock_sections_pass():
    _, parsed = read_config({"pipeline": {"activation_checkpoint_interval": 1, "my_own_thing": 3}})
    assert parsed.is_stock
    assert read_config({})[1].is_stock


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 2}, 8),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 5}, 5),
        ({"train_micro_batch_size_per_gpu": 2}, 1),
        ({"train_batch_size": 32, "gradient_accumulation_steps": 4}, 4),
        ({"train_batch_size": 32}, 1),
    ],
)
def test_micro_batches(config, expected):
    assert micro_batches(config, replicas=2) == expected


@pytest.mark.parametrize("config", [{}, {"train_batch_size": 0}, {"train_batch_size": 3}, {"train_batch_size": "x"}])
def test_micro_batches_that_do_not_fit(config):
    with pytest.raises(ConfigError):
        micro_batches(config, replicas=2)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("key", "configuration key optimizer.params.lr is 0.01 on ranks 0, 2, 3, 0.5 on rank 1"),
        ("absent", "configuration key gradient_clipping is 1.0 on ranks 0, 2, 3, absent on rank 1"),
        ("layer", "layer 2 is Block() on ranks 0, 2, 3, Linear(8, 8) on rank 1"),
        ("frozen", "parameter 2.up.weight is [16, 8] torch.float32"),
    ],
)
def test_ranks_that_differ_are_named(ranks, what, text):
    with pytest.raises(RankError) as caught:
        ranks.run(4, training.differs, timeout=60, what=what)
    errors = caught.value.errors
    assert sorted(errors) == [0, 1, 2, 3]
    assert {error[0] for error in errors.values()} == {"ConfigError"}
    assert all(text in error[1] for error in errors.values()), errors


def test_local_rank_may_differ(ranks):
    assert ranks.run(4, training.tells_ranks_apart, timeout=60) == ["DualPipeEngine"] * 4


@pytest.mark.parametrize(
    ("pipeline", "text"),
    [
        (None, 'different schedules: "dualpipe" on rank 0, "1f1b-deepspeed" on rank 1; give all ranks'),
        ({"schedule": "zbv"}, '"dualpipe" on rank 0, "zbv" on rank 1'),
        ({"schedul": "dualpipe"}, "rank 1, and not all ranks: "),
        ({"schedule": "1f1b", "p2p_timeout_s": -1}, "rank 1, and not all ranks: "),
    ],
)
def test_a_rank_that_reads_another_schedule_is_named(ranks, pipeline, text):
    """Before it goes its own way, by DeepSpeed's own engine or by an error."""
    with pytest.raises(RankError) as caught:
        ranks.run(2, training.reads_another, timeout=60, pipeline=pipeline)
    assert sorted(caught.value.errors) == [0, 1]
    for kind, message, _ in caught.value.errors.values():
        assert kind == "ConfigError" and text in message, message
