"""Times of layers: a list of seconds, one number a layer, as a JSON file or as text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from ...errors import ConfigError
from ..aside import write_whole
from ..plain_json import parse, read_text


def write_layer_costs(path: str | Path, seconds: Sequence[float]) -> None:
    """Write the file that `"layer_costs"` and `dualpipe compare --layer-costs` read.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        write_whole(path, json.dumps(list(seconds)) + "\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the times of layers to {path}: {error}") from None


def read_layer_costs(path: str | Path) -> list[float]:
    """Read a list of times, one a layer.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        data = parse(read_text(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the times of layers from {path}: {error}") from None
    return check_layer_costs(data, str(path))


def parse_layer_costs(text: str) -> list[float]:
    """Times from the command line: a .json file, or numbers with commas, where 1x40 stands for forty of 1.

    Raises:
        ConfigError: see `check_layer_costs`.
    """
    if text.endswith(".json"):
        return read_layer_costs(text)
    times: list[float | None] = []
    for part in text.split(","):
        match = re.fullmatch(r"([^x]+)(?:x([1-9]\d{0,5}))?", part)
        try:
            times += [float(match[1])] * int(match[2] or 1) if match else [None]
        except ValueError:
            times += [None]
    return check_layer_costs(times, repr(text))


def check_layer_costs(data: object, source: str) -> list[float]:
    """The times, if they are some; `source` stands in the error.

    Raises:
        ConfigError: it is no list of numbers, or one is negative or not finite, or all are 0.
    """
    if not isinstance(data, list) or not all(_is_time(value) for value in data) or not sum(data):
        raise ConfigError(f"{source} is no list of times, one number a layer, none negative and not all 0")
    return [float(value) for value in data]


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value) and value >= 0
