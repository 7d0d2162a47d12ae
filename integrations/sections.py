"""Sections of DeepSpeed's configuration that users add to those that a trainer makes of its own arguments."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from dualpipe_engine.errors import ConfigError
from dualpipe_engine.models.autoep.section import NAME as EXPERT_PARALLEL

OURS = ("pipeline", EXPERT_PARALLEL)  #: sections with values "auto" of their own


def read_sections(given: object, instead: Mapping[str, str]) -> dict[str, Any]:
    """A copy of what a user gives as `deepspeed_config=`; None: nothing.

    Args:
        given: of the user.
        instead: names that are not taken, and what sets them.

    Raises:
        ConfigError: it is no mapping, has one of those names, or a value "auto" as for Hugging Face's own use of
            DeepSpeed.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"deepspeed_config= is a dict of sections, got {given!r}: of a file give json.load's result")
    for name, argument in instead.items():
        if name in given:
            raise ConfigError(f'"{name}" in deepspeed_config= would have no effect beside {argument}: use that')
    sections: dict[str, Any] = copy.deepcopy(dict(given))
    for name in _automatic({name: value for name, value in sections.items() if name not in OURS}):
        raise ConfigError(f'"{name}": "auto" in deepspeed_config=: leave it out, and it is filled in')
    return sections


def _automatic(found: Mapping[str, Any]) -> Iterator[str]:
    for name, value in found.items():
        if value == "auto":
            yield name
        elif isinstance(value, Mapping):
            yield from _automatic(value)
