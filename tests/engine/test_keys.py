"""Every key of DeepSpeed's configuration works, does nothing under stock pipelines either, or is refused."""

from __future__ import annotations

import ast
import importlib.util
import logging
from pathlib import Path

import key_runs
import pytest
import torch
from deepspeed.runtime.zero import config as zero_config

from dualpipe_engine.engine.config import read_config
from dualpipe_engine.engine.keys import TABLES, Status, refuse_misspelt
from dualpipe_engine.errors import ConfigError

ROOT = Path(__file__).parents[2]
ROWS = [row for rows in TABLES.values() for row in rows]
#: Keys of rows that others than `DeepSpeedConfig` read.
ELSEWHERE = {"checkpoint.async", "optimizer.params", "pipeline.use_reentrant", "sequence_parallel_size"}


def load_tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = load_tables()


@pytest.fixture(scope="module")
def keys():
    return tables.configuration_keys()


def test_every_key_has_a_row(keys):
    assert tables.without_a_row(keys, ROWS) == []
    named = {path for row in ROWS for path in row.paths if not path.endswith("*")}
    assert named - set(keys) == ELSEWHERE


def test_a_new_key_is_found(monkeypatch):
    class Newer(zero_config.DeepSpeedZeroConfig):
        planted: int = 0

    monkeypatch.setattr(zero_config, "DeepSpeedZeroConfig", Newer)
    monkeypatch.setattr("deepspeed.runtime.config.get_dump_state", lambda config: config.get("grown", False))
    assert tables.without_a_row(tables.configuration_keys(), ROWS) == ["grown", "zero_optimization.planted"]


def test_the_page_is_what_the_rows_say(keys):
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == tables.configuration_page(keys), "run `python docs/tables.py`"


def test_rows_name_tests_that_exist():
    for row in ROWS:
        assert bool(row.test) == (row.status is not Status.IDLE), row
        if row.test:
            path, name = row.test.split("::")
            functions = ast.parse((ROOT / "tests" / path).read_text()).body
            assert name in {getattr(each, "name", None) for each in functions}, row


REFUSED = [(path, row) for row in ROWS if row.off is not None for path in row.paths]


@pytest.mark.parametrize(("path", "row"), REFUSED, ids=[path for path, _ in REFUSED])
def test_refused(path, row):
    asks = next(value for value in (True, False, 2, "float16") if value not in row.off and type(value) in _types(row))
    plain = {"pipeline": {"schedule": "zb1p"}}
    for value in row.off:
        read_config(key_runs.with_keys(plain, {path: value}))
    with pytest.raises(ConfigError) as caught:
        read_config(key_runs.with_keys(plain, {path: asks}))
    text = str(caught.value)
    assert text.startswith('"{}": {!r}'.format(path.replace(".", '": {"'), asks)) and row.why in text
    read_config(key_runs.with_keys({}, {path: asks}))  # DeepSpeed's own engine may do something with it


def _types(row):
    return {type(value) for value in row.off if value is not None} or {bool}


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("gradient_cliping", "gradient_clipping"),
        ("Optimiser", "optimizer"),
        ("lr_scheduler", "scheduler"),
        ("zero_optimisation", "zero_optimization"),
        ("optimizer.param", "params"),
        ("scheduler.parms", "params"),
        ("checkpoint.tag_validaton", "tag_validation"),
        ("checkpoint.parallel_write.pipeline_stages", "pipeline_stage"),
        ("data_types.grad_accum_dtypes", "grad_accum_dtype"),
        ("fp16.enable", "enabled"),
    ],
)
def test_a_misspelt_key_is_refused(path, near):
    """DeepSpeed passes over most of them."""
    config = key_runs.with_keys({}, {path: {}})
    with pytest.raises(ConfigError) as caught:
        read_config(config | {"pipeline": {"schedule": "zb1p"}})
    assert '"{}": ...'.format(path.replace(".", '": {"')) in str(caught.value)
    assert f'did you mean "{near}"' in str(caught.value)
    read_config(config)  # DeepSpeed's own engine says what it says


def test_keys_of_others_pass():
    own = {
        "_optimizer": {},
        "//gradient_clipping": 2,
        "checkpoint_dir": "x",
        "seed": 3,
        "local_rank": 0,
        "my": {"a": 1},
    }
    read_config(own | {"pipeline": {"schedule": "zb1p"}, "optimizer": {"type": "Adam", "params": {"typo": 1}}})
    named = key_runs.with_keys({}, {path: False for row in ROWS for path in row.paths if path.count(".") == 0})
    refuse_misspelt(named | {"optimizer": {"type": "Adam", "params": {}}})


def test_what_is_switched_off_asks_for_nothing():
    off = {"fp16": {"enabled": False, "auto_cast": True}, "torch_autocast": {"enabled": False, "dtype": "float16"}}
    read_config(off | {"pipeline": {"schedule": "zb1p"}})


def same(found, plain, rel=1e-6):
    for rank in found:
        expected, *_ = rank[plain]
        for name, (losses, weights, *_) in rank.items():
            assert losses == pytest.approx(expected, rel=rel), name
            for each, value in rank[plain][1].items():
                torch.testing.assert_close(weights[each], value, rtol=rel, atol=rel, msg=f"{name}: {each}")


ZERO = "zero_optimization."
FP16 = {"fp16.enabled": True, "fp16.initial_scale_power": 4}


def test_keys_that_do_not_change_the_training(ranks):
    one = {ZERO + "stage": 1}
    other = {
        "reduce_bucket_size": 7,
        "allgather_bucket_size": 8,
        "contiguous_gradients": False,
        "reduce_scatter": False,
        "use_multi_rank_bucket_allreduce": False,
        "parameter_alignment": True,
        "round_robin_gradients": True,
        "compute_grad_norm": False,
    }
    more = {"comms_logger.enabled": True, "pipeline.pipe_partitioned": False, "pipeline.grad_partitioned": False}
    variants = {"plain": one, "other": one | {ZERO + key: value for key, value in other.items()} | more}
    same(ranks.run(2, key_runs.trained, schedule="dualpipe", variants=variants), "plain")
    variants = {"plain": FP16, "legacy": FP16 | {"optimizer.legacy_fusion": True}}
    same(ranks.run(2, key_runs.trained, schedule="dualpipe", variants=variants, optimizer=key_runs.ADAM), "plain")


def test_deepspeed_finds_its_fragments(ranks):
    orders = {"aligned": ["parameter_alignment"], "in turns": ["round_robin_gradients"]}
    orders["both"] = [key for keys in orders.values() for key in keys]
    variants = {name: {ZERO + "stage": 2} | {ZERO + key: True for key in keys} for name, keys in orders.items()}
    assert ranks.run(2, key_runs.fragments, variants=variants) == [dict.fromkeys(variants, 0.0)] * 2


def test_how_gradients_are_reduced(ranks):
    """The sum over two replicas, at half the rate, is the mean."""
    half, one = {"optimizer.params": {"lr": 0.05}, "gradient_allreduce_op": "sum"}, {ZERO + "stage": 1}
    variants = {
        "plain": {},
        "between": {"gradient_predivide_factor": 2.0},
        "before, in ZeRO": {"prescale_gradients": True} | one,
        "sum": half,
        "sum in ZeRO": half | one,
        "coarse": {"communication_data_type": "fp16"},
    }
    for rank in ranks.run(4, key_runs.reduced, variants=variants):
        coarse = rank.pop("coarse")
        assert any(not torch.equal(coarse[each], value) for each, value in rank["plain"].items())
        for each, value in rank["plain"].items():
            torch.testing.assert_close(coarse[each], value, rtol=1e-3, atol=1e-3)
            for name, found in rank.items():
                torch.testing.assert_close(found[each], value, rtol=1e-6, atol=1e-7, msg=f"{name}: {each}")


def test_keys_of_bf16(ranks):
    bf16, one = {"bf16.enabled": True}, {ZERO + "stage": 1}
    variants = {
        "plain": bf16,
        "kept": bf16
        | {
            "bf16.immediate_grad_update": True,
            "data_types.buffer_dtype": "bf16",
            "data_types.keep_in_fp32_modules": ["scale"],
        },
        "old name": {
            "bfloat16.enabled": True,
            "bfloat16.check_grad_overflow": False,
            "data_types.param_dtype": "bf16",
            "data_types.buffer_dtype": "bf16",
        },
        "fp32 sums": bf16 | one | {"data_types.grad_accum_dtype": "fp32"},
        "low masters": bf16 | one | {"bf16.bf16_master_weights_and_grads": True, "bf16.bf16_optimizer_states": True},
    }
    found = ranks.run(2, key_runs.trained, schedule="zb1p", variants=variants, optimizer=key_runs.ADAM)
    same(found, "plain", rel=0.03)
    for rank in found:
        assert rank["kept"][0] == rank["old name"][0] == rank["plain"][0]
        dtypes = {name: each[2] for name, each in rank.items()}
        assert dtypes["plain"] == dtypes["kept"] == {torch.float32} and dtypes["old name"] == {torch.bfloat16}


@pytest.mark.all
def test_master_weights_in_fp16(ranks):
    """DeepSpeed wants its own Adam on the host for them, which is built first."""
    host = {ZERO + "stage": 1, ZERO + "offload_optimizer.device": "cpu"}
    variants = {"plain": FP16 | host, "low masters": FP16 | host | {"fp16.fp16_master_weights_and_grads": True}}
    adam = {"type": "Adam", "params": {"lr": 0.01}}
    same(ranks.run(2, key_runs.trained, schedule="dualpipe", variants=variants, optimizer=adam), "plain", rel=0.03)


def test_autocast(ranks):
    cast = {"torch_autocast.enabled": True, "torch_autocast.dtype": "bfloat16"}
    variants = {
        "plain": {},
        "cast": cast,
        "in ZeRO": cast | {ZERO + "stage": 1},
        "of no layer": cast | {"torch_autocast.lower_precision_safe_modules": []},
    }
    found = ranks.run(2, key_runs.trained, schedule="dualpipe", variants=variants)
    same(found, "plain", rel=0.02)
    for rank in found:
        assert rank["plain"][0] not in (rank["cast"][0], rank["in ZeRO"][0])


def test_checkpoints_with_other_keys(ranks, tmp_path):
    variants = {
        "plain": {},
        "tags": {"checkpoint.tag_validation": "Fail"},
        "all write": {"checkpoint.parallel_write.pipeline_stage": True},
        "old format": {"checkpoint.checkpoint_serialization": False},
        "from the weights": {ZERO + "load_from_fp32_weights": False},
    }
    for rank in ranks.run(2, key_runs.saved, folder=str(tmp_path), schedule="dualpipe", variants=variants):
        assert len({loss for losses in rank.values() for loss in losses}) == 1, rank


def test_what_is_written_and_read(ranks):
    plain = ranks.run(2, key_runs.written, keys={})[0]
    assert plain["collects"] and plain["batches"] == 3 and "time (" not in plain["printed"]
    keys = {"steps_per_print": 1, "wall_clock_breakdown": True, "memory_breakdown": True, "dump_state": True}
    keys |= {"log_level": "debug", "disable_python_gc": True, "dataloader_drop_last": True}
    found = ranks.run(2, key_runs.written, keys=keys)[0]
    assert found["level"] == logging.DEBUG and not found["collects"] and found["batches"] == 2
    assert found["printed"].count("iter time (s)") == 2
    assert found["printed"].count("time (ms) | F: ") == 2 and " | STEP: " in found["printed"]
    memory, dump = "DeepSpeed Engine: After args sanity test", "DeepSpeedEngine:"
    assert memory in found["printed"] and memory not in plain["printed"]
    assert found["logged"].count(dump) > plain["logged"].count(dump)
