"""Sequences that replicas share: a Trainer's own loops read, cut and count whole ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dualpipe_engine.errors import ConfigError

SIZE = "sequence_parallel_size"


def refuse_shared_sequences(settings: Mapping[str, Any]) -> None:
    """Refuse "sequence_parallel_size" in the sections of a user.

    Raises:
        ConfigError: it is other than 1.
    """
    if settings.get(SIZE, 1) != 1:
        raise ConfigError(
            f'deepspeed_config= with "{SIZE}": {settings[SIZE]!r} would share sequences among replicas that a Trainer '
            "gives data of their own: leave it out, or call dualpipe_engine.initialize in a loop of yours"
        )
