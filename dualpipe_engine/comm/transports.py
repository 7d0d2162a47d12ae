"""The transports by backend: which one carries the messages of a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from .communicators import Pair
from .stream import StreamTicket
from .transport import GroupTransport, Transport


class PipelineTransport(Transport, Protocol):
    """A transport with an end."""

    def close(self) -> None:
        """Give back what it holds; all ranks of the pipeline do."""


class MakeTransport(Protocol):
    """Makes the transport of one rank; the arguments are those of `GroupTransport`."""

    def __call__(
        self,
        ranks: Sequence[int],
        rank: int,
        group: dist.ProcessGroup,
        device: torch.device,
        log: list[StreamTicket] | None = None,
        *,
        edges: Iterable[Pair],
        timeout_s: float,
    ) -> PipelineTransport: ...


#: Backend of torch.distributed -> makes a transport. What `register_transport` fills; backends are the process's, too.
_ADDED: dict[str, MakeTransport] = {}


def register_transport(backend: str, make: MakeTransport) -> None:
    """Let pipelines whose process group is of a backend ("gloo", "nccl") send through the transport that `make` makes,
    in place of `GroupTransport`."""
    _ADDED[backend] = make


def transport_of(group: dist.ProcessGroup) -> MakeTransport:
    """What makes the transport of a rank of a pipeline: of the kind that is registered for the group's backend."""
    return _ADDED.get(dist.get_backend(group), GroupTransport)
