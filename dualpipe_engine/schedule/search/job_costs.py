"""Measurement: what was measured on a job's real stages. All that `auto` decides on, as a JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ...errors import ConfigError, PlanError
from ..placement import Placement
from ..plain_json import Json, parse
from ..timing.costs import CostModel

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
    """

    costs: CostModel
    ranks: int
    layers: int
    reduction: Mapping[str, float] = field(default_factory=dict)
    state_bytes: Mapping[str, int] = field(default_factory=dict)
    memory_bytes: int | None = None
    job: Mapping[str, str] = field(default_factory=dict)
    recomputed: CostModel | None = None

    def costs_of(self, recompute: bool) -> CostModel:
        """The costs with what the layers list computed again, or without."""
        return self.recomputed if recompute and self.recomputed is not None else self.costs

    def differences(self, job: Mapping[str, str]) -> list[str]:
        """What is different in `job`, each as "name: measured -> now"."""
        names = sorted(self.job.keys() | job.keys())
        return [
            f"{name}: {self.job.get(name)} -> {job.get(name)}" for name in names if self.job.get(name) != job.get(name)
        ]

    def memory_cap(self, placement: Placement) -> int | None:
        """Activations that fit into the memory left beside weights, gradients and optimizer state; None: unknown.

        Raises:
            PlanError: these alone do not fit.
        """
        state = self.state_bytes.get(placement.key)
        if self.memory_bytes is None or state is None:
            return None
        size = self.costs.for_placement(placement).activation_bytes
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
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(self.to_json())
            part.replace(target)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot write the measurement {target}: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> Measurement:
        """Read a file that `save` wrote.

        Raises:
            ConfigError: it cannot be read or is none.
        """
        try:
            data = parse(Path(path).read_text())
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
            again = data.get("recomputed")
            known = {each.name for each in fields(cls)} - {"costs", "recomputed"}
            found = cls(
                costs=_costs(data["costs"]),
                recomputed=None if again is None else _costs(again),
                **{key: data[key] for key in known if key in data},
            )
            for costs in filter(None, (found.costs, found.recomputed)):
                costs.check(found.ranks)
        except (KeyError, TypeError, AttributeError, PlanError) as error:
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
