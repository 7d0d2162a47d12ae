"""Sections of DeepSpeed's configuration and settings of accelerate, with which a DualPipeTrainer is made."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate.utils import DataLoaderConfiguration, DynamoBackend
from dualpipe_engine.integrations.random_streams import undrawn
from dualpipe_engine.integrations.sections import read_sections
from dualpipe_engine.integrations.transformers.refusals import SET_BY_ARGUMENTS, refuse_launcher, refuse_replicas
from torch.utils.data import DataLoader
from transformers.trainer_utils import seed_worker

from dualpipe_engine.compat import DualPipeTrainer
from dualpipe_engine.errors import ConfigError


@pytest.mark.parametrize(
    "given, match",
    [
        ({"optimizer": {"type": "SGD"}}, '"optimizer" .* beside optim= of the TrainingArguments'),
        ({"scheduler": {"type": "WarmupLR"}}, '"scheduler" .* beside lr_scheduler_type='),
        ({"train_batch_size": 8}, '"train_batch_size" .* beside per_device_train_batch_size='),
        ({"gradient_accumulation_steps": 3}, "beside num_chunks="),
        ({"gradient_clipping": "auto"}, '"gradient_clipping": "auto" .* leave it out'),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}, '"reduce_bucket_size": "auto"'),
        ("ds.json", "a dict of sections, got 'ds.json'"),
    ],
)
def test_sections_without_an_effect_are_refused(given, match):
    with pytest.raises(ConfigError, match=match):
        DualPipeTrainer(deepspeed_config=given)


def test_sections_are_a_copy():
    given = {"zero_optimization": {"stage": 2}, "pipeline": {"overlap": "auto"}}
    found = read_sections(given, SET_BY_ARGUMENTS)
    assert found == given and found["zero_optimization"] is not given["zero_optimization"]
    assert read_sections(None, SET_BY_ARGUMENTS) == {}


def test_arguments_are_refused_before_accelerate_reads_them():
    arguments = transformers.TrainingArguments(report_to=[], use_cpu=True)
    arguments.parallelism_config = "of two ranks"
    with pytest.raises(ConfigError, match="pass num_stages= to DualPipeTrainer"):
        DualPipeTrainer(args=arguments)


def launched(precision="no", dynamo="NO", **given):
    state = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DynamoBackend(dynamo)))
    accelerator = SimpleNamespace(state=state, mixed_precision=precision)
    plugins = {"is_deepspeed_enabled": False, "is_fsdp_enabled": False} | given
    return SimpleNamespace(accelerator=accelerator, **plugins)


def test_what_accelerate_launch_sets_up_is_taken_or_refused():
    refuse_launcher(launched(), {"bf16": {"enabled": False}})
    refuse_launcher(launched("bf16"), {"bf16": {}})
    for trainer, sections, match in (
        (launched(is_deepspeed_enabled=True), {}, "set up for DeepSpeed, .* start with torchrun"),
        (launched(is_fsdp_enabled=True), {}, "set up for FSDP"),
        (launched(dynamo="INDUCTOR"), {}, "set up for TorchDynamo"),
        (launched("fp8"), {}, '"fp8" of accelerate .* use "bf16"'),
        (launched("bf16"), {"bf16": {"enabled": False}}, "contradicts the TrainingArguments"),
    ):
        with pytest.raises(ConfigError, match=match):
            refuse_launcher(trainer, sections)


def test_the_precision_is_that_of_accelerate():
    trainer = object.__new__(DualPipeTrainer)
    trainer.args = transformers.TrainingArguments(report_to=[], use_cpu=True)
    trainer._extra, trainer._num_chunks, trainer._schedule = {}, 2, "dualpipe"
    for precision, found in (("bf16", True), ("no", False)):
        trainer.accelerator = SimpleNamespace(mixed_precision=precision)
        assert ("bf16" in trainer._configuration()) == found


def test_workers_of_one_reader_draw_the_same():
    loader = DataLoader(range(8), worker_init_fn=partial(seed_worker, num_workers=2, rank=3), num_workers=2)
    trainer = object.__new__(DualPipeTrainer)
    trainer.accelerator = SimpleNamespace(device=None, rng_types=[], dataloader_config=DataLoaderConfiguration())
    assert trainer._prepare_loader(2, 1, loader).worker_init_fn.keywords == {"num_workers": 2, "rank": 1}


def test_replicas_count_tokens_together():
    refuse_replicas(SimpleNamespace(average_tokens_across_devices=False), 1)
    with pytest.raises(ConfigError, match="2 replicas"):
        refuse_replicas(SimpleNamespace(average_tokens_across_devices=False), 2)


def test_what_is_drawn_for_another_purpose_counts_for_nothing():
    torch.manual_seed(1)
    with undrawn():
        first = torch.rand(3)
    assert torch.equal(first, torch.rand(3))
