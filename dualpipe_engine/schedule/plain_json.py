"""JSON from files that anybody may have written."""

from __future__ import annotations

import json
from typing import Any, TypeAlias

Json: TypeAlias = Any
"""What a JSON text holds, until it is looked at."""


def parse(text: str) -> Json:
    """What a JSON text holds.

    Raises:
        ValueError: it is none, or nested so deeply that no program of ours can have written it.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
