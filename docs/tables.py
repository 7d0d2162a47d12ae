"""Write docs/configuration.md and docs/engine.md: what becomes of each key and each method of DeepSpeed.

    python docs/tables.py

Keys are found by letting DeepSpeed's own `DeepSpeedConfig` read configurations that note what it asks for; methods by
looking at its classes. What we say of each stands in `dualpipe_engine/engine/keys.py` and `methods.py`.
"""

from __future__ import annotations

import ast
import inspect
import logging
import sys
import textwrap
import typing
from collections.abc import Iterator, KeysView, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from pydantic import BaseModel

from dualpipe_engine.engine import keys, methods

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


def without_a_row(found: Sequence[str], rows: Sequence[keys.KeyRow]) -> list[str]:
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


def _names(row: keys.KeyRow, found: Sequence[str]) -> str:
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
from what DeepSpeed reads and from `dualpipe_engine/engine/keys.py`; our own keys of the section `"pipeline"` are on the
page [keys of the "pipeline" section](pipeline_section.md).

- works: as in DeepSpeed, or as the row says;
- stock does nothing either: DeepSpeed's own pipeline engine does not use the key;
- refused: any value that asks for something is one error on every rank, before memory is allocated.

So is a key that is nearly one of these, which DeepSpeed would mostly pass over: `"gradient_cliping"`. Keys of your own
may stand beside; one that is taken for a misspelling may begin with `_`.
"""


def engine_names() -> list[str]:
    """Public methods and attributes that DeepSpeed's engines define, without what only reads the configuration."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.pipe.engine import PipelineEngine

    found: set[str] = set()
    for engine in (DeepSpeedEngine, PipelineEngine):
        found |= {name for name in vars(engine) if not reads_configuration(vars(engine)[name])}
        found |= _set_on_self(engine)
    return sorted(name for name in found if not name.startswith("_"))


def reads_configuration(method: Any) -> bool:
    """Whether a method without arguments does no more than return a value of the configuration."""
    if not inspect.isfunction(method) or list(inspect.signature(method).parameters) != ["self"]:
        return False
    definition = ast.parse(textwrap.dedent(inspect.getsource(method))).body[0]
    assert isinstance(definition, ast.FunctionDef)
    body = definition.body[1:] if ast.get_docstring(definition) else definition.body
    return len(body) == 1 and isinstance(body[0], ast.Return) and "self._config" in ast.unparse(body[0])


def _set_on_self(engine: type) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(engine)))) if _is_set(node)]
    return {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def _is_set(node: ast.AST) -> bool:
    """Whether it is `self.name`, set."""
    if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Store):
        return False
    return isinstance(node.value, ast.Name) and node.value.id == "self"


def engine_page() -> str:
    """docs/engine.md."""
    lines = [_ENGINE_HEAD]
    lines += ["| works | test |", "|---|---|"]
    lines += [f"| {_listed(names)} | {_test(test)} |" for test, names in methods.WORKS.items()]
    lines += ["", "| as in DeepSpeed's own pipeline engine | |", "|---|---|"]
    lines += [f"| {_listed(names)} | {why} |" for why, names in methods.AS_STOCK.items()]
    lines += ["", "| refused | because |", "|---|---|"]
    lines += [f"| `{name}` | {why} |" for name, why in methods.REFUSED.items()]
    attributes = _listed(" ".join(sorted(methods.REFUSED_ATTRIBUTES)))
    lines += [f"| {attributes} | they belong to DeepSpeed's instruction schedule, which does not run |", ""]
    return "\n".join(lines)


def _listed(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split())


_ENGINE_HEAD = """# Methods and attributes of the engine

What becomes of each public name of DeepSpeed's `PipelineEngine` and `DeepSpeedEngine` under a `"schedule"`. Written by
`python docs/tables.py` from `dualpipe_engine/engine/methods.py`. Names that only return a value of the configuration
(`train_batch_size()`, `zero_optimization_stage()`, ...) answer as in DeepSpeed, and those of `torch.nn.Module`
(`parameters()`, `state_dict()`, ...) are about the layers of this rank. What is refused raises a `DualPipeError`.
"""


def main() -> None:
    here = Path(__file__).parent
    found = configuration_keys()
    if missing := without_a_row(found, [row for rows in keys.TABLES.values() for row in rows]):
        sys.exit(f"no row in dualpipe_engine/engine/keys.py has {', '.join(missing)}")
    if missing := sorted(set(engine_names()) - methods.named()):
        sys.exit(f"no row in dualpipe_engine/engine/methods.py has {', '.join(missing)}")
    (here / "configuration.md").write_text(configuration_page(found))
    (here / "engine.md").write_text(engine_page())


if __name__ == "__main__":
    main()
