"""The "pipeline" section of the DeepSpeed JSON, read and checked before anything is allocated."""

from __future__ import annotations

import re
import signal
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import ConfigError, PlanError
from ..models.autoep import section as expert_parallel
from ..schedule.cuts.counts import parse_counts
from ..schedule.orders.registry import KNOWN, known_schedule
from .given import Settings
from .keys import refuse_keys

STOCK = "1f1b-deepspeed"
PAIRS = "pairs"  #: the partition method that is ours
AUTO = "auto"
#: What DeepSpeed 0.19.8 itself reads from the section.
DEEPSPEED_KEYS = frozenset(
    (
        "stages",
        "partition",
        "seed_layers",
        "activation_checkpoint_interval",
        "pipe_partitioned",
        "grad_partitioned",
        "use_reentrant",
    )
)
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


class DualPipeConfig(BaseModel):
    """Our keys of the "pipeline" section."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schedule: str = STOCK
    """A name of `schedule.orders.registry`, "auto", a path to a plan file (.csv, .json), or "1f1b-deepspeed"."""
    optimize: bool = True
    """Take the best candidate under the known costs; false runs the reference order."""
    costs: str | None = None
    """File of measured costs. "auto" writes it (default: dualpipe_costs.json) and reads it at the next start; with a
    named schedule `optimize` uses it in place of equal costs."""
    split_backward: Literal["auto"] | bool = "auto"
    """Run I and W apart. "auto" and true: wherever a layer's weights allow it; false: full backwards only."""
    overlap: Literal["auto"] | bool = "auto"
    """Run F&B pairs through a stage's own `overlapped_forward_backward`; false runs F, then B."""
    stages_per_rank: int | None = Field(default=None, ge=1)
    """Stages that a rank holds under "interleaved" and "interleaved_zb", which take any number; null: 2."""
    activation_cap: int | None = Field(default=None, ge=1)
    """Most stage activations a rank may hold; null is the schedule's own bound."""
    p2p_timeout_s: float = Field(default=600.0, gt=0, le=1e7)
    """Seconds after which a transfer that does not come is an error."""
    check_twins: int | None = Field(default=None, ge=1)
    """Compare all copies of every parameter by hash after every so many steps; null: never."""
    check_finite: bool = False
    """NaN or inf: true also looks at every weight gradient and ends the run before the optimizer steps; false warns."""
    load_report_steps: int | None = Field(default=None, ge=1)
    """Report after every so many steps how evenly the experts of each layer were used; null: with "steps_per_print"."""
    partition_method: str | None = None
    """How layers are cut into stages: "6,6,5,5" are the layers of each, first stage first; "pairs" so that ranks have
    equal work and the plan runs fast, "parameters", "uniform" or "type:REGEX"; null keeps the PipelineModule's cut, or
    its method where the schedule has more stages."""
    layer_costs: str | None = None
    """File with the seconds of each layer, for "pairs"; null estimates them from parameters."""

    recompute: bool | list[str] = False
    """Modules that are computed again in the backward, so that nothing of them is kept: regular expressions, looked for
    in names of modules within their layers, or class names; true: what layers list in their attribute `recomputed`."""
    offload_activations: Annotated[int, Field(ge=1)] | bool = False
    """Keep activations in host memory between forward and backward: as many as bring the peak of each rank down by this
    number, those that live longest first; true: all that can be away for at least one op."""
    tiled_loss: int | None = Field(default=None, ge=2)
    """Pieces along the sequence in which the last layer's projection and the loss run, so that logits of one piece
    exist at a time; computed again in the backward. null: whole."""
    tiled_mlp: int | None = Field(default=None, ge=2)
    """Pieces along the sequence in which each feed-forward layer runs, computed again in the backward. null: whole."""
    save_on_signal: str | None = None
    """A signal, such as "SIGTERM", at which all ranks save after the batch and end with 128 + its number."""
    save_folder: str | None = None
    """Where "save_on_signal" saves; null is the folder of the last save or load."""

    @property
    def is_stock(self) -> bool:
        return self.schedule == STOCK

    @property
    def plan_file(self) -> Path | None:
        path = Path(self.schedule)
        return path if path.suffix in (".csv", ".json") else None


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
    ours = {key: value for key, value in section.items() if key not in DEEPSPEED_KEYS}
    known = sorted(set(DualPipeConfig.model_fields) | DEEPSPEED_KEYS)
    for key in ours:
        if key not in DualPipeConfig.model_fields:
            near = get_close_matches(key, known, n=1, cutoff=0.6)
            if near or section.get("schedule", STOCK) != STOCK:
                hint = f'did you mean "{near[0]}"?' if near else f"known keys: {', '.join(known)}"
                raise ConfigError(f'unknown key "{key}" in the "pipeline" section: {hint}')
    if section.get("schedule", STOCK) == STOCK and (key := next((key for key in _PROMISES if section.get(key)), None)):
        raise ConfigError(
            f'"{key}" in the "pipeline" section does nothing under DeepSpeed\'s own schedule: leave it out, or set '
            f'"schedule" to one of {", ".join(KNOWN)}'
        )
    if "schedule" not in section:
        return data, DualPipeConfig()
    try:  # other keys may be those of a newer DeepSpeed, for its own engine
        parsed = DualPipeConfig(**{key: value for key, value in ours.items() if key in DualPipeConfig.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f'"pipeline": {{"{first["loc"][0]}": ...}}: {first["msg"]}, got {first["input"]!r}') from None
    _check_schedule(parsed)
    if not parsed.is_stock:
        refuse_keys(data, STOCK)
        expert_parallel.read_section(data.get(expert_parallel.NAME))
    _check_signal(parsed)
    _check_recompute(parsed)
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
    """A dict, a `DeepSpeedConfig`, the path of a file in HJSON, of which JSON is a part, or base64 of such text."""
    if isinstance(config, DeepSpeedConfig):
        config = config._param_dict
    if isinstance(config, dict):
        return config
    try:
        data = load_ds_config(str(config))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the DeepSpeed configuration {config}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"the DeepSpeed configuration {config} holds no keys")
    return data


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


def _check_recompute(config: DualPipeConfig) -> None:
    for name in config.recompute if isinstance(config.recompute, list) else ():
        try:
            compiled = re.compile(name)
        except re.error as error:
            raise ConfigError(f'"recompute": {name!r} is no regular expression: {error}') from None
        if compiled.search(""):
            raise ConfigError(f'"recompute": {name!r} matches anything: give a part of a name, such as "norm"')


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


def check_zero(config: Settings) -> None:
    """Refuse what cannot work with a pipeline.

    Raises:
        ConfigError: ZeRO-3 is asked for, ZeRO-2 for an optimizer that works on whole gradients, or an offload that the
            stage does not have, which DeepSpeed would leave out or replace without a word.
    """
    sections = {name: config.get(name) for name in ("zero_optimization", "optimizer")}
    zero, optimizer = (found if isinstance(found, dict) else {} for found in sections.values())
    stage = zero.get("stage", 0)
    if stage == 3:
        raise ConfigError(
            "ZeRO-3 cannot work with a pipeline: it would gather every stage's weights again for each micro-batch; use "
            '"zero_optimization": {"stage": 1}, which partitions the optimizer state over all copies of a stage'
        )
    if stage == 2 and str(optimizer.get("type", "")).lower() == "muon":
        raise ConfigError('ZeRO-2 keeps no whole gradients, which Muon needs: use "zero_optimization": {"stage": 1}')
    for key in ("offload_optimizer", "offload_param"):
        _check_offload(key, zero, stage)


def _check_offload(key: str, zero: Settings, stage: int) -> None:
    section = zero.get(key)
    device = section.get("device", "none") if isinstance(section, dict) else "none"
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
