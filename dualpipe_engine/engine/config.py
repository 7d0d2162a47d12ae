"""The DeepSpeed JSON, with its "pipeline" section, read and checked before anything is allocated."""

from __future__ import annotations

import signal
from difflib import get_close_matches

from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError

from ..errors import ConfigError, PlanError
from ..models.autoep import section as expert_parallel
from ..schedule.cuts.counts import parse_counts
from ..schedule.orders.registry import KNOWN, STOCK, known_schedule
from ..schedule.plain_json import read_settings
from .given import Settings
from .keys import refuse_keys, refuse_misspelt
from .section import AUTO, PAIRS, DualPipeConfig, check_keys, parse_keys

#: Keys of ours that somebody relies on: they are not to be passed over.
_PROMISES = (
    "stages_per_rank",
    "activation_cap",
    "check_twins",
    "check_finite",
    "recompute",
    "offload_activations",
    "tiled_loss",
    "tiled_mlp",
    "load_report_steps",
    "save_on_signal",
    "save_folder",
)


def read_config(config: object) -> tuple[Settings, DualPipeConfig]:
    """Load a configuration of DeepSpeed, in any form that it takes, and check its "pipeline" section.

    Returns:
        The whole JSON as a dict, and our part of it.

    Raises:
        ConfigError: the file cannot be read, a key is unknown (the nearest is named), or a value has no meaning.
    """
    data = _load(config)
    section = data.get("pipeline", {})
    if not isinstance(section, dict):
        raise ConfigError(f'"pipeline" must be a section {{...}} of keys, got {section!r}')
    _check_async(data, section.get("schedule", STOCK))
    ours = check_keys(section)
    if section.get("schedule", STOCK) == STOCK and (key := next((key for key in _PROMISES if section.get(key)), None)):
        raise ConfigError(
            f'"{key}" in the "pipeline" section does nothing under DeepSpeed\'s own schedule: leave it out, or set '
            f'"schedule" to one of {", ".join(KNOWN)}'
        )
    if "schedule" not in section:
        return data, DualPipeConfig()
    parsed = parse_keys(ours)
    _check_schedule(parsed)
    if not parsed.is_stock:
        refuse_keys(data, STOCK)
        refuse_misspelt(data)
        if isinstance(zero := data.get("zero_optimization"), bool):  # DeepSpeed's old form
            data = data | {"zero_optimization": {"stage": int(zero)}}
        expert_parallel.read_section(data.get(expert_parallel.NAME))
    _check_signal(parsed)
    if parsed.schedule == AUTO and parse_counts(parsed.partition_method) is not None:
        raise ConfigError(
            f'"partition_method": "{parsed.partition_method}" fixes the number of stages, which "schedule": "auto" '
            "chooses: name a schedule, or leave the cut out"
        )
    if parsed.layer_costs is not None and parsed.partition_method != PAIRS:
        raise ConfigError('"layer_costs" is for "partition_method": "pairs": add it, or leave "layer_costs" out')
    return data, parsed


def find_config(args: object, config: object, config_params: object) -> object:
    """The configuration among the arguments of initialize, as DeepSpeed finds it; None if there is none."""
    found = config if config is not None else config_params
    for name in ("deepscale_config", "deepspeed_config"):
        found = getattr(args, name, None) if found is None else found
    return found


def _load(config: object) -> Settings:
    """A dict, a `DeepSpeedConfig`, or what `read_settings` takes."""
    if isinstance(config, DeepSpeedConfig):
        config = config._param_dict
    if isinstance(config, dict):
        return config
    try:
        return read_settings(str(config))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the DeepSpeed configuration {config}: {error}") from None


def _check_async(config: Settings, schedule: object) -> None:
    checkpoint = config.get("checkpoint")
    value = checkpoint.get("async", False) if isinstance(checkpoint, dict) else False
    if not isinstance(value, bool):
        raise ConfigError(f'"checkpoint": {{"async": ...}} must be true or false, got {value!r}')
    if value and schedule == STOCK:
        raise ConfigError(
            '"checkpoint": {"async": true} is for our schedules, stock DeepSpeed would not know it: leave it out, or '
            'set "schedule" in the "pipeline" section'
        )


def _check_signal(config: DualPipeConfig) -> None:
    name = config.save_on_signal
    if name is not None and (name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP")):
        raise ConfigError(
            f'"save_on_signal": "{name}" is no signal that a program can take: "SIGTERM" and "SIGUSR1" are'
        )
    if name is None and config.save_folder is not None:
        raise ConfigError('"save_folder" is for "save_on_signal": add it, or leave "save_folder" out')


def _check_schedule(config: DualPipeConfig) -> None:
    stages = config.stages_per_rank
    if config.is_stock or config.schedule == AUTO:
        return
    if config.schedule in KNOWN:
        try:
            known_schedule(config.schedule, stages)
        except PlanError as error:
            raise ConfigError(f'"stages_per_rank": {stages}: {error}') from None
        return
    if config.plan_file is not None:
        if stages is not None:
            raise ConfigError('a plan file has its own number of stages a rank: leave "stages_per_rank" out')
        if not config.plan_file.is_file():
            raise ConfigError(f'"schedule": there is no plan file {config.schedule}')
        return
    names = [*KNOWN, AUTO, STOCK]
    near = get_close_matches(config.schedule, names, n=1, cutoff=0)
    raise ConfigError(
        f'unknown schedule "{config.schedule}": did you mean "{near[0]}"? There are {", ".join(names)}, '
        "or the path of a plan file"
    )


def micro_batches(config: Settings, replicas: int) -> int:
    """Micro-batches of one pipeline per batch (DeepSpeed's gradient_accumulation_steps), checked as DeepSpeed would.

    Args:
        config: the DeepSpeed JSON.
        replicas: data-parallel replicas of the pipeline.

    Raises:
        ConfigError: the three batch sizes do not fit.
    """
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    train, micro, steps = values = [None if config.get(name) == "auto" else config.get(name) for name in names]
    for name, value in zip(names, values, strict=True):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConfigError(f'"{name}" must be a whole number above 0, got {value!r}')
    if train is None and micro is None:
        raise ConfigError('give "train_batch_size" or "train_micro_batch_size_per_gpu" in the DeepSpeed configuration')
    if train is None:
        return steps or 1
    if micro is not None:
        steps_found, rest = divmod(train, micro * replicas)
    else:
        steps_found, rest = steps or 1, train % ((steps or 1) * replicas)
    if rest or steps_found < 1 or (steps is not None and steps_found != steps):
        raise ConfigError(
            f"the batch sizes do not fit: train_batch_size {train} must be train_micro_batch_size_per_gpu "
            f"{micro or '?'} x gradient_accumulation_steps {steps or '?'} (micro-batches of one pipeline) x "
            f"{replicas} replicas"
        )
    return steps_found


class BatchView:
    """What DeepSpeed's configuration asks a grid for: a sequence counts once, whoever computes parts of it.

    Args:
        groups: of replicas, each with sequences of its own.
    """

    def __init__(self, groups: int) -> None:
        self._groups = groups

    def get_data_parallel_world_size(self) -> int:
        return self._groups


def read_by_deepspeed(config: Settings, readers: int) -> DeepSpeedConfig:
    """The configuration as DeepSpeed understands it, of as many replicas as read data of their own.

    Raises:
        ConfigError: DeepSpeed cannot read it, or `check_zero` refuses it.
    """
    micro_batches(config, readers)
    try:
        read = DeepSpeedConfig(config, BatchView(readers))
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f'["{name}"]' for name in first["loc"])
        raise ConfigError(f"{error.title}{place}: {first['msg']}, got {first['input']!r}") from None
    except Exception as error:
        raise ConfigError(f"DeepSpeed cannot read its configuration: {type(error).__name__}: {error}") from error
    _check_numbers(read)
    check_zero(read)
    return read


def _check_numbers(config: DeepSpeedConfig) -> None:
    """What DeepSpeed takes as it is given, and computes with in the first step."""
    clip, factor, every = config.gradient_clipping, config.gradient_predivide_factor, config.steps_per_print
    number = (int, float)
    for key, value, fits, wanted in (
        ("gradient_clipping", clip, isinstance(clip, number), "a number, 0 for no clipping"),
        ("gradient_predivide_factor", factor, isinstance(factor, number) and factor > 0, "a number above 0"),
        ("steps_per_print", every, every is None or (isinstance(every, number) and every > 0), "above 0, or null"),
    ):
        if not fits:
            raise ConfigError(f'"{key}" must be {wanted}, got {value!r}')
    for section, params in (("optimizer", config.optimizer_params), ("scheduler", config.scheduler_params)):
        for key in params if isinstance(params, dict) else ():
            if params[key] != "auto":
                continue
            raise ConfigError(
                f'"{section}": {{"params": {{"{key}": "auto"}}}} is for a Trainer of Hugging Face, which fills it in: '
                "give its value"
            )


def check_zero(config: DeepSpeedConfig) -> None:
    """Refuse what cannot work with a pipeline.

    Raises:
        ConfigError: ZeRO-3 is asked for, ZeRO-2 for an optimizer that works on whole gradients, or an offload that the
            stage does not have, which DeepSpeed would leave out or replace without a word.
    """
    zero, stage = config.zero_config, int(config.zero_config.stage)
    if stage == 3:
        raise ConfigError(
            "ZeRO-3 cannot work with a pipeline: it would gather every stage's weights again for each micro-batch; use "
            '"zero_optimization": {"stage": 1}, which partitions the optimizer state over all copies of a stage'
        )
    if stage == 2 and str(config.optimizer_name).lower() == "muon":
        raise ConfigError('ZeRO-2 keeps no whole gradients, which Muon needs: use "zero_optimization": {"stage": 1}')
    for key in ("offload_optimizer", "offload_param"):
        section = getattr(zero, key)
        _check_offload(key, "none" if section is None else section.device, stage)


def _check_offload(key: str, device: str, stage: int) -> None:
    if device == "none":
        return
    if key == "offload_param" or device == "nvme":
        raise ConfigError(
            f'"{key}": {{"device": "{device}"}} is for ZeRO-3, which cannot work with a pipeline: leave it out; '
            '"offload_optimizer": {"device": "cpu"} keeps master weights and optimizer state in host memory'
        )
    if stage == 0:
        raise ConfigError(
            f'"{key}" needs partitions of the optimizer state: set "zero_optimization": {{"stage": 1}} or 2'
        )
