"""Watched: methods of an engine that are sections of its watch."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Protocol, TypeVar

if TYPE_CHECKING:
    from .watch import Watch


class Watched(Protocol):
    """An engine that has a watch."""

    watch: Watch


Engine = TypeVar("Engine", bound=Watched)
Args = ParamSpec("Args")
Result = TypeVar("Result")


def watched(method: Callable[Concatenate[Engine, Args], Result]) -> Callable[Concatenate[Engine, Args], Result]:
    """Run a method of the engine as a section of its watch, which is named after the method."""

    @wraps(method)
    def run(self: Engine, *args: Args.args, **kwargs: Args.kwargs) -> Result:
        with self.watch.section(method.__name__):
            return method(self, *args, **kwargs)

    return run
