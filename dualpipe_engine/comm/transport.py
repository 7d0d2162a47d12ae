"""Transport: non-blocking sends and receives of single tensors between the ranks of one pipeline.

`GroupTransport` runs on a torch.distributed process group, `LocalTransport` between threads of one process. A message
is named by (source, destination, tag). Transports that match by order rather than by tag (NCCL) get a communicator for
each directed edge, so that nothing queues behind a transfer of another edge.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from ..errors import PipelineRuntimeError
from .communicators import Pair, close, connect, matches_by_tag, open_pairs, rounds_of
from .gloo_threads import take_turns
from .stream import StreamTicket, open_stream
from .tickets import Ticket


class Transport(Protocol):
    """Sends and receives for one rank of a pipeline; ranks are positions in the pipeline, 0..PP-1.

    Attributes:
        rank: own position.
        ahead: receives from one rank that may be posted and not waited for; None: any number.
        whole: whether a message of several tensors has to travel as one.
    """

    rank: int
    ahead: int | None
    whole: bool

    def send(self, tensor: torch.Tensor, dst: int, tag: int) -> Ticket: ...

    def recv(self, tensor: torch.Tensor, src: int, tag: int) -> Ticket: ...


_Route = tuple[dist.ProcessGroup, int, str]  #: group, rank in it, and what errors call the transfer


class GroupTransport:
    """Transport over torch.distributed, on a communication stream of its own.

    On a backend without tags making one is collective over the world: see `communicators`.

    Args:
        ranks: global ranks of the pipeline, in order of its positions.
        rank: own position.
        group: a process group that holds all of `ranks`.
        device: of the tensors.
        log: takes the ticket of every transfer (`tickets.transfer_of` makes a `Transfer` of it), for whoever clears it;
            None: nothing is kept.
        how: which communication stream, see `stream.open_stream`.
        edges: positions (source, destination) between which tensors travel, the same on all ranks of the pipeline; see
            `Placement.edges`.
        timeout_s: seconds after which a transfer is given up.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        rank: int,
        group: dist.ProcessGroup,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (a constant)
        log: list[StreamTicket] | None = None,
        how: str | None = None,
        *,
        edges: Iterable[Pair],
        timeout_s: float = 600.0,
    ) -> None:
        self.rank = rank
        self.stream = open_stream(device, how)
        self._log = log
        # At the latest when the interpreter ends: its threads must not outlive what they wait for.
        weakref.finalize(self, self.stream.close)
        self._ranks = tuple(ranks)
        self.tagged = matches_by_tag(group)
        self.ahead = None if self.tagged else 1
        self.whole = not self.tagged
        self._groups: dict[Pair, dist.ProcessGroup] = {}
        self._routes: dict[Pair, _Route] = {}
        if self.tagged:
            self._peer = [dist.get_group_rank(group, global_rank) for global_rank in ranks]
            self._group = group
            take_turns()
        else:
            self._connect_edges(edges, device, timeout_s)

    def _connect_edges(self, edges: Iterable[Pair], device: torch.device, timeout_s: float) -> None:
        """One communicator for each directed edge of this rank."""
        rounds = rounds_of(edges)
        there = [[(self._ranks[src], self._ranks[dst]) for src, dst in pairs] for pairs in rounds]
        groups = open_pairs(there, timeout_s, "edge", device)
        mine = [next((pair for pair in pairs if self.rank in pair), None) for pairs in rounds]
        connect(groups, [pair and (self._ranks[pair[0]], self._ranks[pair[1]]) for pair in mine], device)
        for pair, group in zip(mine, groups, strict=True):
            if pair is not None and group is not None:
                self._groups[pair] = group

    def close(self) -> None:
        """End the stream's threads and give the communicators back."""
        self.stream.close()
        close(self._groups.values())
        self._groups.clear()
        self._routes.clear()

    def _route(self, src: int, dst: int) -> _Route:
        sends = src == self.rank
        peer = dst if sends else src
        what = f"{'send to' if sends else 'receive from'} pipeline rank {peer}"
        if self.tagged:
            route = self._group, self._peer[peer], what
        else:
            group = self._groups[src, dst]
            route = group, dist.get_group_rank(group, self._ranks[peer]), what
        self._routes[src, dst] = route
        return route

    def send(self, tensor: torch.Tensor, dst: int, tag: int) -> StreamTicket:
        group, peer, what = self._routes.get((self.rank, dst)) or self._route(self.rank, dst)
        ticket = self.stream.send(group, tensor, peer, tag, what)
        if self._log is not None:
            self._log.append(ticket)
        return ticket

    def recv(self, tensor: torch.Tensor, src: int, tag: int) -> StreamTicket:
        group, peer, what = self._routes.get((src, self.rank)) or self._route(src, self.rank)
        ticket = self.stream.recv(group, tensor, peer, tag, what)
        if self._log is not None:
            self._log.append(ticket)
        return ticket


class LocalHub:
    """Mailboxes shared by the `LocalTransport`s of one process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.boxes: dict[tuple[int, int, int], deque[torch.Tensor]] = defaultdict(deque)
        self.failure: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        """Wake every waiting rank with `error`."""
        with self.changed:
            self.failure = error
            self.changed.notify_all()


class _LocalSend:
    def wait(self, timeout_s: float) -> None:
        pass

    def done(self) -> bool:
        return True


class _LocalRecv:
    def __init__(self, hub: LocalHub, key: tuple[int, int, int], tensor: torch.Tensor) -> None:
        self._hub = hub
        self._key = key
        self._tensor = tensor

    def wait(self, timeout_s: float) -> None:
        hub, src = self._hub, self._key[0]
        with hub.changed:
            if not hub.changed.wait_for(lambda: hub.boxes[self._key] or hub.failure, timeout_s):
                raise PipelineRuntimeError(f"receive from pipeline rank {src} failed: nothing came in {timeout_s} s")
            if not hub.boxes[self._key]:
                raise PipelineRuntimeError(f"receive from pipeline rank {src} failed: {hub.failure}")
            message = hub.boxes[self._key].popleft()
        if message.shape != self._tensor.shape or message.dtype != self._tensor.dtype:
            raise PipelineRuntimeError(
                f"receive from pipeline rank {src} failed: expected {list(self._tensor.shape)} {self._tensor.dtype}, "
                f"got {list(message.shape)} {message.dtype}"
            )
        with torch.no_grad():
            self._tensor.copy_(message)

    def done(self) -> bool:
        return bool(self._hub.boxes[self._key])


class LocalTransport:
    """Transport between threads of one process: every message is copied at the send."""

    ahead = None
    whole = False

    def __init__(self, hub: LocalHub, rank: int) -> None:
        self.rank = rank
        self._hub = hub

    def send(self, tensor: torch.Tensor, dst: int, tag: int) -> Ticket:
        with self._hub.changed:
            self._hub.boxes[self.rank, dst, tag].append(tensor.detach().clone())
            self._hub.changed.notify_all()
        return _LocalSend()

    def recv(self, tensor: torch.Tensor, src: int, tag: int) -> Ticket:
        return _LocalRecv(self._hub, (src, self.rank, tag), tensor)
