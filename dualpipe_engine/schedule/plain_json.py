"""JSON from files that anybody may have written, and configurations of DeepSpeed."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path
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


def read_text(path: str | Path) -> str:
    """A text file in UTF-8 that anybody may have written; spreadsheets and editors put a mark (BOM) before it.

    Raises:
        ValueError: it is in another encoding.
        OSError: the file cannot be read.
    """
    return Path(path).read_text(encoding="utf-8-sig")


def read_settings(given: str) -> dict[str, Json]:
    """A configuration of DeepSpeed, in any form that its command line takes.

    Args:
        given: the path of a file in HJSON, of which JSON is a part, or base64 of such text.

    Raises:
        ValueError: it is neither, holds no keys, or one of them twice.
        OSError: the file cannot be read.
    """
    import hjson

    there = os.path.exists(given)  # of text in base64, which may be longer than names of files are, it says no
    try:
        text = read_text(given) if there else base64.urlsafe_b64decode(given).decode()
    except ValueError:
        raise ValueError("it is neither an existing file of text nor base64 of one") from None
    try:
        data = hjson.loads(text, object_pairs_hook=_each_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(data, dict):
        raise ValueError("it holds no keys")
    return data


def _each_once(pairs: Sequence[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"it has the key {', '.join(twice)} more than once")
    return found
