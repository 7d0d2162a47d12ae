"""Times of layers as a JSON file: a list of seconds, one number a layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def write_layer_costs(path: str | Path, seconds: Sequence[float]) -> None:
    """Write the file that `"layer_costs"` and `dualpipe compare --layer-costs` read.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        Path(path).write_text(json.dumps(list(seconds)) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write the times of layers to {path}: {error}") from None


def read_layer_costs(path: str | Path) -> list[float]:
    """Read a list of times, one a layer.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the times of layers from {path}: {error}") from None
    return check_layer_costs(data, str(path))


def check_layer_costs(data: Any, source: str) -> list[float]:
    """The times, if they are some; `source` stands in the error.

    Raises:
        ConfigError: it is no list of numbers, or one is negative or not finite, or all are 0.
    """
    if not isinstance(data, list) or not all(_is_time(value) for value in data) or not sum(data):
        raise ConfigError(f"{source} is no list of seconds, one number a layer, such as [0.2, 1.0, 1.0, 2.0]")
    return [float(value) for value in data]


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value) and value >= 0
