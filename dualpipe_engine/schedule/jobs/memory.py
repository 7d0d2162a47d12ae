"""Bytes of weights, gradients, optimizer state and activations on each rank, for every schedule beside stock 1F1B.

What a DeepSpeed configuration keeps for a parameter, in bytes (`low`: 2 in bf16 and fp16, else 4):

| | weights | gradients, held over a batch | optimizer |
|---|---|---|---|
| ZeRO-0, fp32 | 4 | 4 | state |
| ZeRO-0, fp16 | 2 | 2 | state + 4 |
| ZeRO-0, bf16 | 2 | 2 | (state + 4) / copies |
| ZeRO-1 | low | 4 with `grad_accum_dtype` fp32, else low | (state + 4) / copies |
| ZeRO-2 | low | 4 / copies | (state + 4) / copies |

`copies` are the ranks that hold the same stages: the replicas, and twice as many in the bidirectional placement; the 4
of the optimizer is the fp32 master weight. With `"offload_optimizer": {"device": "cpu"}` the optimizer's part is host
memory, with 4 / copies of gradients. Left out is what lives for one op only: the gradient that a backward has just made
(vectors and embedding tables: from I to W), and buffers of transfers and reductions. Under ZeRO-1 it can be less, or up
to 4 / copies more: a stage leaves for the fp32 partition while the rank's other stage runs. DeepSpeed's own engine
keeps the bf16 gradient of the last micro-batch beside the sum, so there it is 2 more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import ConfigError, PlanError
from ..orders.registry import SCHEDULES, STOCK
from ..placement import Placement
from ..timing.costs import CostModel
from ..timing.simulate import peak_bytes
from .asked import NOTHING, Asked

_STATE = {"adam": 8, "adamw": 8, "fusedadam": 8, "lamb": 8, "adagrad": 4, "lion": 4}
_WIDTHS = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Training:
    """What is kept for each parameter, in bytes.

    Args:
        weights: of the weights that a forward reads.
        gradients: of what a batch adds up.
        optimizer: of the optimizer's state with its fp32 master weights.
        partitioned: the optimizer state is divided among the copies of a stage.
        gradients_partitioned: the gradients are too.
        stock_gradients: as `gradients`, of DeepSpeed's own pipeline engine.
        offloaded: the optimizer state is in host memory, with gradients in fp32 that the host steps on.
    """

    weights: int
    gradients: int
    optimizer: int
    partitioned: bool
    gradients_partitioned: bool
    stock_gradients: int
    offloaded: bool = False

    @property
    def stock(self) -> Training:
        """The nearest that DeepSpeed's own pipeline engine can do: it has no ZeRO-2."""
        return replace(self, gradients_partitioned=False, gradients=self.stock_gradients)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank; `host` are those in host memory."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    host: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class MemoryRow:
    """One schedule; `ranks` is empty and `reason` says why where it cannot run."""

    schedule: str
    ranks: tuple[Memory, ...] = ()
    reason: str = ""

    @property
    def fullest(self) -> Memory:
        return max(self.ranks, key=lambda memory: memory.total)


def section_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of a DeepSpeed configuration, empty where there is none.

    Raises:
        ConfigError: it is no section.
    """
    found = config.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise ConfigError(f'"{name}" must be a section {{...}} of keys, got {found!r}')
    return found or {}


def is_on(config: Mapping[str, Any], name: str) -> bool:
    """Whether a section is there and enabled.

    Raises:
        ConfigError: it is left to the Trainer ("auto"), or says neither yes nor no.
    """
    value = section_of(config, name).get("enabled", False)
    if not isinstance(value, bool):
        raise ConfigError(f'"{name}": {{"enabled": ...}} must be true or false here, got {value!r}')
    return value


def training_of(config: Mapping[str, Any]) -> Training:
    """Read a DeepSpeed configuration.

    Raises:
        ConfigError: its optimizer, ZeRO stage or number format is not known here.
    """

    on = [name for name in ("bf16", "fp16", "bfloat16") if is_on(config, name)]
    for name in on:
        if section_of(config, name).get(key := f"{name.replace('bfloat', 'bf')}_master_weights_and_grads"):
            raise ConfigError(f'the bytes under "{name}": {{"{key}": true}} are not known here: leave it out')
    kind = "fp32" if not on else "fp16" if on[0] == "fp16" else "bf16"
    sharing = section_of(config, "zero_optimization")
    zero = sharing.get("stage", 0)
    if zero not in (0, 1, 2):
        raise ConfigError(f"a pipeline runs under ZeRO 0, 1 or 2, not {zero!r}")
    accumulation = section_of(config, "data_types").get("grad_accum_dtype") or kind
    if accumulation not in _WIDTHS:
        raise ConfigError(f'"grad_accum_dtype" must be one of {", ".join(_WIDTHS)}, got {accumulation!r}')
    low, state = _WIDTHS[kind], _state_bytes(section_of(config, "optimizer"))
    if zero == 0:
        master, beside = 0 if kind == "fp32" else 4, low if kind == "bf16" else 0
        return Training(low, low, state + master, kind == "bf16", False, low + beside)
    gradients = _WIDTHS[accumulation]
    beside = low if kind == "bf16" and gradients == 4 else 0
    on_host = bool(sharing.get("cpu_offload")) or section_of(sharing, "offload_optimizer").get("device") == "cpu"
    return Training(low, 4 if zero == 2 else gradients, state + 4, True, zero == 2, gradients + beside, on_host)


def _state_bytes(optimizer: Mapping[str, Any]) -> int:
    name = str(optimizer.get("type", "Adam")).lower()
    if name == "sgd":
        return 4 if optimizer.get("params", {}).get("momentum") else 0
    if name not in _STATE:
        known = ", ".join(["SGD", *_STATE])
        raise ConfigError(f"the state of optimizer {optimizer['type']!r} is not known here, only that of {known}")
    return _STATE[name]


def rank_memory(
    placement: Placement,
    training: Training,
    params: Sequence[int],
    replicas: int = 1,
    activations: Sequence[int] | None = None,
) -> tuple[Memory, ...]:
    """The bytes of each rank.

    Args:
        placement: where stages are.
        training: what is kept for a parameter.
        params: parameters of each of the placement's stages.
        replicas: data-parallel replicas of the pipeline.
        activations: bytes of activations on each rank.
    """
    copies = placement.num_directions * replicas
    held = [sum(params[stage] for stage in placement.stages_of(rank)) for rank in range(placement.num_ranks)]
    kept = activations if activations is not None else [0] * placement.num_ranks
    return tuple(state_of(training, [(each, copies)], size) for each, size in zip(held, kept, strict=True))


def state_of(training: Training, params: Sequence[tuple[int, int]], activations: int = 0) -> Memory:
    """The bytes of one rank.

    Args:
        training: what is kept for a parameter.
        params: (parameters, ranks that hold copies of them).
        activations: bytes of them.
    """
    weights = gradients = optimizer = on_host = 0
    for held, copies in params:
        weights += held * training.weights
        gradients += -(-held * training.gradients // (copies if training.gradients_partitioned else 1))
        state = -(-held * training.optimizer // (copies if training.partitioned else 1))
        if training.offloaded:
            on_host += state + -(-held * 4 // copies)
        else:
            optimizer += state
    return Memory(weights, gradients, optimizer, activations, on_host)


def compare_memory(
    training: Training,
    num_ranks: int,
    num_micro: int,
    params: Sequence[int],
    activation_bytes: int = 0,
    replicas: int = 1,
    asked: Asked = NOTHING,
) -> list[MemoryRow]:
    """Stock 1F1B, then every schedule in its reference order.

    Args:
        training: what is kept for a parameter.
        num_ranks: pipeline ranks PP.
        num_micro: micro-batches of one pipeline per batch.
        params: parameters of each 1/PP of the model; placements with more stages a rank cut each into parts.
        activation_bytes: what one micro-batch keeps alive on 1/PP of the model.
        replicas: data-parallel replicas of the pipeline.
        asked: what the configuration asks of them; what changes the bytes of a layer is in `activation_bytes`.

    Raises:
        ConfigError: `params` are for another number of ranks.
    """
    if len(params) != num_ranks:
        raise ConfigError(f"parameters of {len(params)} stages were given for {num_ranks} pipeline ranks")
    costs = CostModel(activation_bytes=activation_bytes)
    rows = []
    for name in (STOCK, *SCHEDULES):
        here, kept = (asked.stock, training.stock) if name == STOCK else (asked, training)
        try:
            placement = here.placement(name, num_ranks)
            placed = costs.for_placement(placement)
            peaks = peak_bytes(here.plan(name, num_ranks, num_micro, placed), placed)
        except PlanError as error:
            rows.append(MemoryRow(name, reason=str(error)))
            continue
        rows.append(MemoryRow(name, rank_memory(placement, kept, _of_stages(params, placement), replicas, peaks)))
    return rows


def _of_stages(params: Sequence[int], placement: Placement) -> list[int]:
    parts = placement.parts
    return [(number + part) // parts for number in params for part in range(parts)]
