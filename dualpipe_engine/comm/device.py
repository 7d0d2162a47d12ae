"""Streams of accelerators: work beside the computation, and copies between host and device that hold nobody up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def on_stream(stream: torch.Stream) -> Iterator[None]:
    """Let the body's work go to `stream`. (A `torch.Stream` as context manager is not safe in several threads.)"""
    before = torch.accelerator.current_stream(stream.device)
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)


def side_stream(device: torch.device) -> torch.Stream | None:
    """A stream for copies beside the computation; None on the CPU.

    Streams come in turns from a small pool, so an owner asks once and keeps it.
    """
    return None if device.type == "cpu" else torch.Stream(device)


def pinned_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Page-locked host memory: only from and to there a copy does not hold the host."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


class Moment:
    """An instant on a stream; see `comm.tickets.Moment`."""

    def __init__(self, stream: torch.Stream) -> None:
        self._event = torch.Event(stream.device, enable_timing=True)
        self._event.record(stream)

    def block(self, stream: torch.Stream) -> None:
        """Let `stream` wait for it."""
        self._event.wait(stream)

    def happened(self) -> bool:
        return bool(self._event.query())

    def since(self, earlier: torch.Event) -> float:
        return float(earlier.elapsed_time(self._event)) / 1e3
