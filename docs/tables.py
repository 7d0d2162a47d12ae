"""Write docs/configuration.md and docs/engine.md: what becomes of each key and each method of DeepSpeed.

    python docs/tables.py

Keys are found by letting DeepSpeed's own `DeepSpeedConfig` read configurations that note what it asks for; methods by
looking at its classes. What we say of each stands in `dualpipe_engine/engine/keys.py` and `methods.py`.
"""

from __future__ import annotations

import logging
import sys
import typing
from collections.abc import Iterator, KeysView, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from pydantic import BaseModel

from dualpipe_engine.engine import keys

KeyPath = tuple[str, ...]
_MARK = "__section__"  # a key whose value tells a model of which section it is


class _Noting(dict[str, Any]):
    """A section of a configuration that notes the keys that are asked for."""

    def __init__(self, path: KeyPath, seen: dict[KeyPath, None], data: Any = ()) -> None:
        super().__init__(data)
        self.path, self.seen = path, seen

    def _note(self, key: str) -> None:
        if key != _MARK:
            self.seen[(*self.path, key)] = None

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._note(str(key))
        return super().__contains__(key)

    def keys(self) -> KeysView[str]:
        return KeysView(self)

    def __copy__(self) -> _Noting:
        return _Noting(self.path, self.seen, dict.items(self))

    copy = __copy__


def configuration_keys() -> list[str]:
    """Every key that DeepSpeed reads, sections included, sorted."""
    seen: dict[KeyPath, None] = {}
    models: dict[KeyPath, type[BaseModel]] = {}
    tried: set[KeyPath] = set()
    with _noting_models(models):
        _read((), seen)
        while left := [path for path in seen if path not in tried]:
            for path in left:
                tried.add(path)
                _read(path, seen)  # as if it were a section
    for path, model in models.items():
        seen.update(dict.fromkeys(_fields(path, model)))
    seen.update(dict.fromkeys(("pipeline", key) for key in _pipeline_keys()))
    return sorted(".".join(path) for path in seen)


def _pipeline_keys() -> Iterator[str]:
    """The section is copied whole, with defaults."""
    from deepspeed.runtime.config import get_pipeline_config

    return iter(get_pipeline_config({}))


def _read(path: KeyPath, seen: dict[KeyPath, None]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = section = _Noting((), seen, {"train_micro_batch_size_per_gpu": 1})
    for depth, key in enumerate(path, 1):
        inner = _Noting(path[:depth], seen, {_MARK: path[:depth]})
        dict.__setitem__(section, key, inner)
        section = inner
    try:
        DeepSpeedConfig(config)
    except Exception:  # a section where a number is wanted: what it has asked for until then is noted
        return


@contextmanager
def _noting_models(models: dict[KeyPath, type[BaseModel]]) -> Iterator[None]:
    original = BaseModel.__init__

    def init(self: BaseModel, /, **data: Any) -> None:
        path = data.pop(_MARK, None)
        if path is not None:
            models.setdefault(path, type(self))
        original(self, **data)

    logging.disable(logging.CRITICAL)
    with mock.patch.object(BaseModel, "__init__", init):
        yield
    logging.disable(logging.NOTSET)


def _fields(path: KeyPath, model: type[BaseModel]) -> Iterator[KeyPath]:
    for name, field in model.model_fields.items():
        inner = (*path, field.alias or name)
        yield inner
        for kind in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _fields(inner, kind)


def without_a_row(found: Sequence[str], rows: Sequence[keys.Row]) -> list[str]:
    """Keys of DeepSpeed that no row names."""
    named = {path for row in rows for path in row.paths}
    sections = tuple(path.removesuffix("*") for path in named if path.endswith(".*"))
    return [key for key in found if key not in named and not key.startswith(sections)]


def configuration_page(found: Sequence[str]) -> str:
    """docs/configuration.md."""
    lines = [_KEYS_HEAD]
    for heading, rows in keys.TABLES.items():
        lines += [f"## {heading}", "", "| keys | | test |", "|---|---|---|"]
        for row in rows:
            why = row.why and (f": {row.why}" if row.status is not keys.Status.IDLE else f" ({row.why})")
            lines.append(f"| {_names(row, found)} | {row.status.value}{why} | {_test(row.test)} |")
        lines.append("")
    return "\n".join(lines)


def _names(row: keys.Row, found: Sequence[str]) -> str:
    named = {path for rows in keys.TABLES.values() for each in rows for path in each.paths}
    shown: list[str] = []
    for path in row.paths:
        if path.endswith(".*"):
            shown += [key for key in found if key.startswith(path[:-1]) and key not in named]
        else:
            shown.append(path)
    return ", ".join(f"`{name}`" for name in shown)


def _test(test: str) -> str:
    path, _, name = test.partition("::")
    return f"[{name}](../tests/{path})" if test else ""


_KEYS_HEAD = """# Keys of the DeepSpeed configuration

What becomes of each key under a `"schedule"`; without one, DeepSpeed itself runs. Written by `python docs/tables.py`
from what DeepSpeed reads and from `dualpipe_engine/engine/keys.py`; our own keys of the section `"pipeline"` are in the
[README](../README.md#keys-of-the-pipeline-section).

- works: as in DeepSpeed, or as the row says;
- stock does nothing either: DeepSpeed's own pipeline engine does not use the key;
- refused: any value that asks for something is one error on every rank, before memory is allocated.
"""


def main() -> None:
    here = Path(__file__).parent
    found = configuration_keys()
    if missing := without_a_row(found, [row for rows in keys.TABLES.values() for row in rows]):
        sys.exit(f"no row in dualpipe_engine/engine/keys.py has {', '.join(missing)}")
    (here / "configuration.md").write_text(configuration_page(found))


if __name__ == "__main__":
    main()
