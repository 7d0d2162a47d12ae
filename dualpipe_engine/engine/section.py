"""Our keys of the "pipeline" section, their types and defaults."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import ConfigError
from ..schedule.orders.registry import STOCK

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


def check_keys(section: Mapping[str, object]) -> dict[str, object]:
    """The keys of a section that are ours, or may be those of a newer DeepSpeed for its own engine.

    Raises:
        ConfigError: a key is unknown; the nearest is named.
    """
    ours = {key: value for key, value in section.items() if key not in DEEPSPEED_KEYS}
    known = sorted(set(DualPipeConfig.model_fields) | DEEPSPEED_KEYS)
    for key in ours:
        if key not in DualPipeConfig.model_fields:
            near = get_close_matches(key, known, n=1, cutoff=0.6)
            if near or section.get("schedule", STOCK) != STOCK:
                hint = f'did you mean "{near[0]}"?' if near else f"known keys: {', '.join(known)}"
                raise ConfigError(f'unknown key "{key}" in the "pipeline" section: {hint}')
    return ours


def parse_keys(ours: Mapping[str, object]) -> DualPipeConfig:
    """What `check_keys` has found, as far as it is ours.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """
    try:
        known = {key: value for key, value in ours.items() if key in DualPipeConfig.model_fields}
        parsed = DualPipeConfig.model_validate(known)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f'"pipeline": {{"{first["loc"][0]}": ...}}: {first["msg"]}, got {first["input"]!r}') from None
    _check_recompute(parsed)
    return parsed


def _check_recompute(config: DualPipeConfig) -> None:
    for name in config.recompute if isinstance(config.recompute, list) else ():
        try:
            compiled = re.compile(name)
        except re.error as error:
            raise ConfigError(f'"recompute": {name!r} is no regular expression: {error}') from None
        if compiled.search(""):
            raise ConfigError(f'"recompute": {name!r} matches anything: give a part of a name, such as "norm"')
