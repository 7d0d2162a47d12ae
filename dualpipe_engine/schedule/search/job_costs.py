"""Measurement: what was measured on a job's real stages. All that `auto` decides on, as a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ...errors import ConfigError, PlanError
from ..aside import write_whole
from ..placement import Placement
from ..plain_json import Json, parse, read_text
from ..timing.costs import CostModel
from .layer_costs import LayerCosts

VERSION = 2


@dataclass(frozen=True)
class Measurement:
    """Costs of a model cut into `ranks` stages, and what bounds the choice of a schedule.

    Args:
        costs: seconds and bytes of each stage of the linear cut.
        ranks: pipeline ranks.
        layers: layers of the model; a placement with more stages than layers is impossible.
        reduction: `key` of a placement -> seconds that reducing the gradients of a rank's stages over their copies
            takes.
        state_bytes: `key` of a placement -> bytes of weights, gradients and optimizer state that a rank has yet to
            allocate.
        memory_bytes: bytes that were free on the device when `state_bytes` was taken; None: unknown.
        job: what was measured, so that a file is not used for another job.
        recomputed: as `costs`, with what the layers list computed again in the backward; None: it was not measured.
        of_layers: what single layers take; None: it was not measured.
    """

    costs: CostModel
    ranks: int
    layers: int
    reduction: Mapping[str, float] = field(default_factory=dict)
    state_bytes: Mapping[str, int] = field(default_factory=dict)
    memory_bytes: int | None = None
    job: Mapping[str, str] = field(default_factory=dict)
    recomputed: CostModel | None = None
    of_layers: LayerCosts | None = None

    def again(self, recompute: bool) -> Measurement:
        """With the costs of what the layers list computed again, if it is."""
        return replace(self, costs=self.recomputed) if recompute and self.recomputed is not None else self

    def placed(self, placement: Placement, bounds: Sequence[int] | None = None) -> CostModel:
        """Costs of the stages of a placement.

        Args:
            placement: of the stages.
            bounds: of a cut of the layers, which have to be measured; None: stages of the linear cut in equal parts.
        """
        if bounds is None:
            return self.costs.for_placement(placement)
        assert self.of_layers is not None
        return self.of_layers.costs_of(self.costs, bounds)

    def state(self, placement: Placement, bounds: Sequence[int] | None = None) -> int | None:
        """`state_bytes` of a placement, on a cut in the ratio of the parameters of the fullest rank; None: unknown."""
        state, layers = self.state_bytes.get(placement.key), self.of_layers
        if state is None or bounds is None or layers is None:
            return state
        return round(state * layers.most_params(placement, bounds) / max(1, layers.most_params(placement)))

    def differences(self, job: Mapping[str, str]) -> list[str]:
        """What is different in `job`, each as "name: measured -> now"."""
        names = sorted(self.job.keys() | job.keys())
        return [
            f"{name}: {self.job.get(name)} -> {job.get(name)}" for name in names if self.job.get(name) != job.get(name)
        ]

    def memory_cap(self, placement: Placement, bounds: Sequence[int] | None = None) -> int | None:
        """Activations that fit into the memory left beside weights, gradients and optimizer state; None: unknown.

        Args: see `placed`.

        Raises:
            PlanError: these alone do not fit.
        """
        state = self.state(placement, bounds)
        if self.memory_bytes is None or state is None:
            return None
        size = self.placed(placement, bounds).activation_bytes
        largest = max(size) if isinstance(size, tuple) else size
        cap = (self.memory_bytes - state) // max(1, largest)
        if cap < 1:
            raise PlanError(
                f"a rank needs {gib(state)} for weights, gradients and optimizer state and {gib(largest)} for each "
                f"activation, but {gib(self.memory_bytes)} are free"
            )
        return cap

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps({"dualpipe_measurement": VERSION, **asdict(self)}, indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the file; a reader sees the old one or the whole new one.

        Raises:
            ConfigError: it cannot be written.
        """
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, self.to_json())
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot write the measurement {target}: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> Measurement:
        """Read a file that `save` wrote.

        Raises:
            ConfigError: it cannot be read or is none.
        """
        try:
            data = parse(read_text(path))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the measurement {path}: {error}") from None
        return cls.from_dict(data, str(path))

    @classmethod
    def from_dict(cls, data: Json, name: str) -> Measurement:
        """Parse what `to_json` made; `name` stands in errors.

        Raises:
            ConfigError: it is no measurement.
        """
        if not isinstance(data, dict) or data.get("dualpipe_measurement") != VERSION:
            raise ConfigError(f'{name} is no measurement of this version: delete it, and "schedule": "auto" writes one')
        try:
            again, layers = data.get("recomputed"), data.get("of_layers")
            known = {each.name for each in fields(cls)} - {"costs", "recomputed", "of_layers"}
            found = cls(
                costs=_costs(data["costs"]),
                recomputed=None if again is None else _costs(again),
                of_layers=None if layers is None else LayerCosts(**{name: tuple(layers[name]) for name in layers}),
                **{key: data[key] for key in known if key in data},
            )
            for costs in filter(None, (found.costs, found.recomputed)):
                costs.check(found.ranks)
                if found.of_layers is not None:
                    found.of_layers.costs_of(costs, (0, found.layers))
        except (KeyError, IndexError, TypeError, AttributeError, PlanError) as error:
            raise ConfigError(f"the measurement {name} is damaged: {error}") from None
        return found


def _costs(data: Mapping[str, Any]) -> CostModel:
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    return CostModel(**given)


def gib(size: float) -> str:
    """Bytes as text in a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{size:.4g} {unit}"
        size /= 1024
    raise AssertionError
