"""The errors of dualpipe_engine. Whatever a user can cause is a `DualPipeError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class DualPipeError(Exception):
    """Base of every error that dualpipe_engine raises on purpose.

    Attributes:
        everywhere: whether all ranks raise it at the same place of their program, so that none needs to be told.
    """

    def __init__(self, *args: object, everywhere: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.everywhere = everywhere


class ConfigError(DualPipeError, ValueError):
    """A configuration cannot work; the message names the key and the remedy."""


class PlanError(DualPipeError, ValueError):
    """A plan, an op text or a schedule request is not valid; the message names rank, op and reason."""


class ProfileError(DualPipeError, ValueError):
    """A profile cannot be made or read; the message names the file or the remedy."""


class MissingAttributeError(DualPipeError, AttributeError):
    """An attribute of DeepSpeed's own engine does not exist here; the message says why."""


class MissingExtraError(DualPipeError, ImportError):
    """An optional package is needed; the message holds the install command."""


class PipelineRuntimeError(DualPipeError, RuntimeError):
    """A step failed while it ran: a peer was lost, a transfer timed out or shapes disagree."""


class OutputError(PipelineRuntimeError):
    """What a stage has made cannot be passed on; the message says why."""


class CheckpointError(DualPipeError, RuntimeError):
    """A checkpoint cannot be loaded or converted; the message names the file and the remedy."""


class OtherRanksError(CheckpointError):
    """A checkpoint's optimizer state is cut for other ranks or another schedule, and can be converted."""


@contextmanager
def raised_everywhere() -> Iterator[None]:
    """The body depends on nothing but what is the same on all ranks: its errors are those of all."""
    try:
        yield
    except DualPipeError as error:
        error.everywhere = True
        raise
