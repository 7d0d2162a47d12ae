"""TRL's trainers on a pipeline beside TRL's own in one process: losses, norms, metrics."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

pytest.importorskip("trl", reason='needs pip install "dualpipe_engine[trl]"')

import datasets
import trl
import trl_runs as runs
from dualpipe_engine.integrations.trl import DualPipeDPOTrainer
from dualpipe_engine.integrations.trl.fused import fused
from dualpipe_engine.integrations.trl.refusals import refuse_data, refuse_settings
from ranks import RankError

from dualpipe_engine.errors import ConfigError


def assert_same(ours, theirs, steps):
    assert sum("loss" in row for row in theirs) == steps and len(ours) == len(theirs)
    large = max(row.get("loss", 0.0) for row in theirs) > 10  # IPO squares sums over tokens
    for found, expected in zip(ours, theirs, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            near = {"abs": 1e-6, "rel": 0.0 if name == "loss" and not large else 1e-6}
            if name == "grad_norm":
                near = {"rel": 1e-4}
            elif any(each in name for each in ("logps", "logits", "rewards")):  # sums over the tokens of a row
                near = {"rel": 1e-6, "abs": 1e-5}
            assert found[name] == pytest.approx(value, **near), name


def beside(ranks, tmp_path, run, world, steps, num_chunks=3, **options):
    theirs = ranks.run(1, run, folder=str(tmp_path / "stock"), stock=True, steps=steps, **options)[0]
    ours = ranks.run(world, run, folder=str(tmp_path / "ours"), steps=steps, num_chunks=num_chunks, **options)
    for found in ours:
        assert_same(found, theirs, steps)


def test_fine_tuning_is_that_of_one_process(ranks, tmp_path):
    beside(ranks, tmp_path, runs.sft, world=2, steps=3)


def test_preferences_are_those_of_one_process(ranks, tmp_path):
    beside(ranks, tmp_path, runs.dpo, world=2, steps=3)


def test_a_reference_on_a_pipeline_of_its_own_is_that_of_one_process(ranks, tmp_path):
    beside(ranks, tmp_path, runs.dpo, world=2, steps=3, reference="another")


@pytest.mark.all
@pytest.mark.parametrize(
    "reference, world, schedule",
    [*((reference, 4, "dualpipe") for reference in runs.REFERENCES), ("another", 2, "dualpipev")],
)
def test_twenty_steps_with_a_reference(ranks, tmp_path, reference, world, schedule):
    theirs = ranks.run(1, runs.dpo, folder=str(tmp_path / "stock"), stock=True, steps=20, reference=reference)[0]
    options = {"num_chunks": 3, "schedule": schedule, "reference": reference}
    for found in ranks.run(world, runs.dpo, folder=str(tmp_path / "ours"), steps=20, **options):
        assert_same(found, theirs, 20)


@pytest.mark.all
@pytest.mark.parametrize("reference", ["another", "without adapters"])
def test_references_ahead_of_training(ranks, tmp_path, reference):
    """Log-probabilities of another model, and of a model without its adapters, as columns of the data."""
    given = {"reference": reference, "config": {"precompute_ref_log_probs": True}}
    beside(ranks, tmp_path, runs.dpo, world=2, steps=4, **given)


@pytest.mark.all
def test_equal_weights_in_bf16_have_equal_log_probabilities(ranks, tmp_path):
    options = {"reference": "reloaded", "steps": 2, "config": {"bf16": True}, "num_chunks": 3}
    for found in ranks.run(2, runs.dpo, folder=str(tmp_path), **options):
        assert found[0]["rewards/chosen"] == found[0]["rewards/rejected"] == 0.0
        assert found[1]["rewards/chosen"] != 0.0


@pytest.mark.all
def test_twenty_steps_in_fresh_processes(tmp_path):
    """Under torchrun, beside TRL's own in a process of its own."""
    script = str(Path(runs.__file__))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command, kind in (([sys.executable], "stock"), (launcher, "ours")):
        done = subprocess.run([*command, script, str(tmp_path), kind], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads((tmp_path / "stock-0.json").read_text())
    for rank in range(2):
        ours = json.loads((tmp_path / f"ours-{rank}.json").read_text())
        assert ours.keys() == theirs.keys() == runs.FRESH.keys()
        for name, expected in theirs.items():
            assert_same(ours[name], expected, 20)


@pytest.mark.all
@pytest.mark.parametrize(
    "run, case",
    [(runs.sft, case) for case in runs.SFT_CASES] + [(runs.dpo, case) for case in runs.DPO_CASES],
    ids=[*runs.SFT_CASES, *runs.DPO_CASES],
)
def test_every_argument_that_is_honoured_is_that_of_one_process(ranks, tmp_path, run, case):
    beside(ranks, tmp_path, run, world=2, steps=3, **(runs.SFT_CASES | runs.DPO_CASES)[case])


def arguments(kind, **given):
    return kind(output_dir="unused", report_to=[], use_cpu=True, bf16=False, **given)


@pytest.mark.parametrize("kind, cases", [(trl.SFTConfig, runs.SFT_CASES), (trl.DPOConfig, runs.DPO_CASES)])
def test_every_argument_is_in_the_table_of_the_docs(kind, cases):
    """An argument of a newer TRL is one that nobody has looked at; what is called refused is, and the others run."""
    text = (Path(__file__).parents[2] / "docs" / "trainer.md").read_text()
    part = text.partition(f"of `{kind.__name__}` | here |\n")[2].partition("\n\n")[0]
    rows = [row.split("|")[1:3] for row in part.splitlines()[1:]]
    rows = [(re.findall("`([a-z0-9_]+)`", names), what.strip()) for names, what in rows]
    told = [name for names, _ in rows for name in names]
    plain = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    assert len(told) == len(set(told))
    assert set(told) == {field.name for field in dataclasses.fields(kind)} - plain
    refuse_settings(arguments(kind), 2)
    tried = {"loss_type", "precompute_ref_log_probs"}.union(*(case["config"] for case in cases.values()))
    tried |= {"chat_template_path"} if "chat_template" in tried else set()
    for names, what in rows:
        for name in names:
            if what.startswith("refused"):
                with pytest.raises(ConfigError, match=name):
                    refuse_settings(arguments(kind, **{name: True}), 2)
            elif not what.startswith("no effect"):
                assert name in tried, name


OWN = [(runs.sft, {"compute_loss_func": runs.mean_over_tokens}), (runs.sft, {"change": runs.half})]
OWN += [(runs.dpo, {"change": runs.half})]
OTHER = [(runs.sft, {"compute_loss_func": runs.largest_token}), (runs.sft, {"change": runs.square})]
OTHER += [(runs.dpo, {"change": runs.square})]


@pytest.mark.all
@pytest.mark.parametrize("run, given", OWN)
def test_a_loss_of_ones_own_that_adds_up_is_that_of_one_process(ranks, tmp_path, run, given):
    beside(ranks, tmp_path, run, world=2, steps=3, **given)


@pytest.mark.all
@pytest.mark.parametrize("run, given", OTHER)
@pytest.mark.parametrize("num_chunks", [3, 6], ids=["two rows", "one row"])
def test_a_loss_of_ones_own_that_does_not_add_up_is_refused(ranks, tmp_path, run, given, num_chunks):
    with pytest.raises(RankError, match=r"micro-batches (do not|cannot) add up to the batch"):
        ranks.run(2, run, folder=str(tmp_path), steps=2, num_chunks=num_chunks, **given)


@pytest.mark.all
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"rows": runs.PAIRS},
        {"config": {"loss_type": "dft"}},
        {"config": {"label_smoothing_factor": 0.1}},
        {"config": {"packing": True, "packing_strategy": "wrapped"}},
    ],
    ids=["text", "completions", "dft", "smoothed", "packed"],
)
def test_twenty_steps_on_four_ranks(ranks, tmp_path, given):
    beside(ranks, tmp_path, runs.sft, world=4, steps=20, **given)


@pytest.mark.all
def test_replicas_share_their_metrics(ranks, tmp_path):
    """Each of two pipelines has other rows; what is logged is of both."""
    found = ranks.run(4, runs.sft, folder=str(tmp_path), steps=2, num_chunks=3, num_stages=2, schedule="dualpipev")
    assert all(each == found[0] for each in found)
    assert found[0][0]["mean_token_accuracy"] >= 0 and found[0][1]["num_tokens"] > found[0][0]["num_tokens"] > 200


@pytest.mark.all
def test_replicas_with_a_reference_are_one_process_with_a_larger_batch(ranks, tmp_path):
    given = {"reference": "another", "steps": 2}
    whole = {"config": {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 4}}
    theirs = ranks.run(1, runs.dpo, folder=str(tmp_path / "stock"), stock=True, **given, **whole)[0]
    half = {"config": {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}}
    options = {"num_chunks": 2, "num_stages": 2, "schedule": "dualpipev"}
    for found in ranks.run(4, runs.dpo, folder=str(tmp_path / "ours"), **given, **half, **options):
        assert_same(found, theirs, 2)


@pytest.mark.all
@pytest.mark.parametrize(
    "given, num_chunks",
    [({}, 3), ({"config": {"loss_type": ["ipo", "hinge"]}}, 3), ({"config": {"loss_type": ["sft"]}}, 1)],
    ids=["sigmoid", "weighted", "over the batch"],
)
def test_twenty_steps_of_preferences_on_four_ranks(ranks, tmp_path, given, num_chunks):
    beside(ranks, tmp_path, runs.dpo, world=4, steps=20, num_chunks=num_chunks, **given)


@pytest.mark.parametrize(
    "kind, given, match",
    [
        (trl.SFTConfig, {"padding_free": True}, "wrapped"),
        (trl.SFTConfig, {"packing": True}, "wrapped"),
        (trl.SFTConfig, {"activation_offloading": True}, "offload_activations"),
        (trl.DPOConfig, {"activation_offloading": True}, "offload_activations"),
        (trl.DPOConfig, {"sync_ref_model": True}, "sync_ref_model"),
        (trl.DPOConfig, {"loss_type": ["sigmoid", "aot"]}, "num_chunks=1"),
    ],
)
def test_arguments_without_an_effect_are_refused(kind, given, match):
    with pytest.raises(ConfigError, match=match):
        refuse_settings(arguments(kind, **given), 2)


def test_what_a_pipeline_does_not_have_is_refused():
    refuse_data(SimpleNamespace(_is_vision_dataset=False, aux_loss_enabled=False))
    with pytest.raises(ConfigError, match="images"):
        refuse_data(SimpleNamespace(_is_vision_dataset=True, aux_loss_enabled=False))
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef=0\.0"):
        refuse_data(SimpleNamespace(_is_vision_dataset=False, aux_loss_enabled=True))
    with pytest.raises(ConfigError, match="compute_metrics"):
        DualPipeDPOTrainer(torch.nn.Linear(1, 1), args=arguments(trl.DPOConfig), compute_metrics=dict)
    with pytest.raises(ConfigError, match="num_chunks=1"):
        DualPipeDPOTrainer(torch.nn.Linear(1, 1), args=arguments(trl.DPOConfig, loss_type=["sft"]))
    with pytest.raises(ConfigError, match="evaluate"):
        DualPipeDPOTrainer.predict(object.__new__(DualPipeDPOTrainer))


def test_the_fused_head_is_that_of_trl():
    from trl.trainer.utils import add_fused_lm_head

    model = runs.make_model(37)
    tokens = torch.randint(0, 37, (3, 7), generator=torch.Generator().manual_seed(1))
    labels = tokens.masked_fill(tokens % 3 == 0, -100)
    found = fused(model(input_ids=tokens).logits, labels)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))
    expected = model(input_ids=tokens, labels=labels, fused_lm_head=True)
    for name in set(expected) - {"loss"}:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_log_probabilities_of_the_reference_ahead_need_rows_to_add_to():
    trainer = object.__new__(DualPipeDPOTrainer)
    trainer._made = trainer._ahead = True
    rows = datasets.Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset()
    with pytest.raises(ConfigError, match="which an IterableDataset has not: leave it out"):
        trainer._precompute_ref_logps(rows, "train", 1)
