"""Streams of accelerators: work beside the computation, and copies between host and device that hold nobody up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .nest import Nest


@contextmanager
def on_stream(stream: torch.Stream) -> Iterator[None]:
    """Let the body's work go to `stream`. (A `torch.Stream` as context manager is not safe in several threads.)"""
    before = torch.accelerator.current_stream(stream.device)
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)


class Side:
    """A stream of an accelerator, for copies beside the computation.

    Attributes:
        ahead: whether a copy that is begun goes on while the host does something else.
    """

    ahead = True

    def __init__(self, stream: torch.Stream) -> None:
        self._stream = stream

    def running(self) -> AbstractContextManager[None]:
        """Let the body's work go to the stream."""
        return on_stream(self._stream)

    def begin(self, move: Callable[..., Nest], value: Nest, *args: object) -> tuple[Nest, torch.Event | None]:
        """Begin to move a value to the device.

        Returns:
            What `move(value, *args)` has made, which holds no data before the event; None where it has some already,
            as where the current stream has made the value.
        """
        if any(_is_on_device(leaf) for leaf in pytree.tree_leaves(value)):
            return move(value, *args), None
        with on_stream(self._stream):
            return move(value, *args), self._stream.record_event()

    def to_device(self, tensor: Tensor, device: torch.device, copy: bool) -> Tensor:
        """A tensor moved to the device; holds no data yet within `begin`.

        Args:
            copy: also where it is there already.
        """
        if _is_on_device(tensor):
            return tensor.to(device, copy=copy)
        return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)

    def to_host(self, tensor: Tensor, follow: Callable[[], None]) -> Tensor:
        """A copy on the host, which waits for it while the device goes on.

        Args:
            follow: lets the current stream wait for what makes the tensor.
        """
        landed = pinned_empty(tensor.shape, tensor.dtype)
        with on_stream(self._stream):
            follow()
            landed.copy_(tensor, non_blocking=True)
            copied = self._stream.record_event()
        copied.synchronize()
        return landed


class InTurn:
    """In its place on the CPU, which does one thing after the other; see `Side`."""

    ahead = False

    def running(self) -> AbstractContextManager[None]:
        return nullcontext()

    def begin(self, move: Callable[..., Nest], value: Nest, *args: object) -> tuple[Nest, torch.Event | None]:
        return move(value, *args), None

    def to_device(self, tensor: Tensor, device: torch.device, copy: bool) -> Tensor:
        return tensor.to(device, copy=copy)

    def to_host(self, tensor: Tensor, follow: Callable[[], None]) -> Tensor:
        return tensor


def side_stream(device: torch.device) -> Side | InTurn:
    """A stream for copies beside the computation.

    Streams come in turns from a small pool, so an owner asks once and keeps it.
    """
    return InTurn() if device.type == "cpu" else Side(torch.Stream(device))


def _is_on_device(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type != "cpu"


def pinned_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Page-locked host memory: only from and to there a copy does not hold the host."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)


class EventMoment:
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
