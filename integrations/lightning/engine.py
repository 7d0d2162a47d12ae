"""From a Trainer and a module to a DualPipeEngine: the configuration, the PipelineModule, the engine."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from lightning.pytorch import Trainer
from torch import nn

import dualpipe_engine
from dualpipe_engine.errors import ConfigError

from ..clipping import CLIPPING
from .batches import StageLoss
from .layers import LayerEntry
from .pipeline import Pipeline

if TYPE_CHECKING:
    from .module import DualPipeLightningModule

#: Precisions of Lightning, and the sections of DeepSpeed's configuration that are the same.
PRECISIONS: dict[str, dict[str, Any]] = {
    "32-true": {},
    "bf16-mixed": {"torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}},
    "bf16-true": {"bf16": {"enabled": True}},
    "16-true": {"fp16": {"enabled": True}},
}

#: Values of Trainer(gradient_clip_algorithm=...) that are one.
BY_NORM = (None, "norm")

#: Of DeepSpeed's configuration, what Lightning and its module say.
SET_BY_LIGHTNING = {
    "optimizer": "configure_optimizers",
    "scheduler": "configure_optimizers",
    "train_batch_size": "the batch_size of the DataLoader",
    "train_micro_batch_size_per_gpu": "the batch_size of the DataLoader and num_chunks= of the module",
    "gradient_accumulation_steps": "num_chunks= of the module",
}


def configuration(
    trainer: Trainer, schedule: str, extra: Mapping[str, Any], num_chunks: int, fitting: bool
) -> dict[str, Any]:
    """DeepSpeed's configuration of an engine.

    Args:
        trainer: whose precision and clipping it has.
        schedule: of the pipeline.
        extra: sections of the user.
        num_chunks: micro-batches of a batch.
        fitting: whether it trains; an engine that evaluates has no optimizer.

    Raises:
        ConfigError: a precision has no counterpart.
    """
    precision = str(trainer.precision)
    if precision not in PRECISIONS:
        raise ConfigError(
            f'precision="{precision}" is none of the engine\'s: use {", ".join(PRECISIONS)}; "16-true" scales the loss'
        )
    by_norm = trainer.gradient_clip_algorithm in BY_NORM
    sections = copy.deepcopy(dict(extra))
    pipeline = {"schedule": schedule, **sections.pop("pipeline", {})}
    found = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": num_chunks,
        CLIPPING: float(trainer.gradient_clip_val or 0.0) if by_norm else 0.0,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        **PRECISIONS[precision],
        **sections,
        "pipeline": pipeline,
    }
    if not fitting:
        for name in ("zero_optimization", "optimizer", "scheduler"):
            found.pop(name, None)
    elif trainer.gradient_clip_val and not by_norm:
        _check_clipping_by_value(found)
    return found


def _check_clipping_by_value(settings: Mapping[str, Any]) -> None:
    stage = settings["zero_optimization"].get("stage", 0)
    low = any(settings.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
    if stage or low:
        raise ConfigError(
            'gradient_clip_algorithm="value" needs whole gradients in fp32: clip by "norm", or use '
            'DualPipeStrategy(deepspeed_config={"zero_optimization": {"stage": 0}}) and precision="32-true"'
        )


def make_module(
    module: DualPipeLightningModule,
    layers: dict[str, LayerEntry],
    stages: int,
    replicas: int,
    environment: Any,  # noqa: ANN401
) -> Pipeline:
    """The layers as a PipelineModule. Collective over all ranks.

    Raises:
        ConfigError: there are fewer layers than stages, or the accelerator is not DeepSpeed's.
    """
    if len(layers) < stages:
        raise ConfigError(f"{len(layers)} layers cannot fill {stages} pipeline stages: use fewer devices")
    kind, device = get_accelerator().device_name(), module.trainer.strategy.root_device.type
    if kind != device:
        raise ConfigError(
            f"DeepSpeed runs on {kind}, but the Trainer on {device}: set the environment variable "
            f"DS_ACCELERATOR={device} before the start"
        )
    os.environ.setdefault(
        "LOCAL_RANK", str(environment.local_rank())
    )  # Lightning sets it for all processes but its own
    deepspeed.init_distributed(verbose=False)  # takes the process group that is there
    loss = StageLoss(module.criterion)
    made = PipelineModule(
        list(layers.values()),
        topology=PipeDataParallelTopology(stages, replicas),
        loss_fn=loss,
        partition_method="parameters",
        dynamic_shape=True,
    )
    pipeline = Pipeline(made, list(layers), loss)
    if module._later:
        state = {name: module._later[whole] for name, whole in pipeline.whole_names() if whole in module._later}
        made.load_state_dict(state, strict=False)
        module._later = {}
    return pipeline


def make_engine(pipeline: Pipeline, settings: dict[str, Any], optimizers: list[Any], schedulers: list[Any]) -> None:
    """The engine of a pipeline; learning rates are scheduled by Lightning. Collective over all ranks.

    Raises:
        ConfigError: the configuration cannot work, or a scheduler knows other groups of parameters than the ranks have.
    """
    module: nn.Module = pipeline.local_module
    if not optimizers and settings.get("bf16", {}).get("enabled"):
        module.bfloat16()
    if not optimizers and settings.get("fp16", {}).get("enabled"):
        module.half()
    if not optimizers:
        settings = {name: section for name, section in settings.items() if name not in ("bf16", "fp16")}
    known = [scheduler for scheduler in schedulers if hasattr(scheduler, "base_lrs")]
    engine, *_ = dualpipe_engine.initialize(
        model=module,
        optimizer=optimizers[0] if optimizers else None,
        lr_scheduler=known[0] if known else None,  # looked at: whether it was made for the groups of all ranks
        config=settings,
    )
    engine.lr_scheduler = None
    pipeline.start(engine)
