"""Site: tells griffe, which reads the docstrings, that the fields of a NamedTuple are the arguments of its class."""

from __future__ import annotations

from typing import Any

from griffe import Attribute, Class, Extension, Function, Parameter, ParameterKind, Parameters


class NamedTuples(Extension):
    def on_class(self, *, cls: Class, **_: Any) -> None:
        if not any(str(base).rpartition(".")[2] == "NamedTuple" for base in cls.bases):
            return
        kind = ParameterKind.positional_or_keyword
        fields = [
            Parameter(name, annotation=field.annotation, kind=kind, default=field.value)
            for name, field in cls.members.items()
            if isinstance(field, Attribute) and field.annotation is not None and "property" not in field.labels
        ]
        first = Parameter("self", kind=kind)
        cls.set_member("__init__", Function("__init__", parameters=Parameters(first, *fields), returns="None"))
