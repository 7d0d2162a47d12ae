"""All-to-all over rows, differentiable, and posted rather than waited for where a `Tickets` is given.

Expert parallelism sends each token to the ranks of its experts and back (DeepSeek-V3 report, section 3.2.1: "dispatch"
and "combine"). The backward of one is the other with the splits exchanged. How many rows come from where is an exchange
of its own before that (`Counts`), and the only thing that the host has to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..schedule.progress import waiting
from .communicators import beside
from .stream import SharedStream, shared_stream
from .tickets import Moments, Tickets

TIMEOUT_S = 600.0  #: of an exchange that nobody overlaps


def exchange(
    rows: Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    group: dist.ProcessGroup,
    tickets: Tickets | None = None,
    stream: SharedStream | None = None,
    ready: bool = False,
) -> Tensor:
    """Send consecutive blocks of rows to the ranks of a group and receive theirs.

    Args:
        rows: [sum(send), ...]; block i goes to group rank i.
        send: rows for each rank.
        receive: rows from each rank.
        group: the ranks.
        tickets: takes the ticket, of the backward too; the result (the gradient) holds no data before its `wait`. The
            rows must then be used by nothing else that backward adds up. None: wait here.
        stream: posts it, and the backward; None: the one of the device, opened for this exchange if nobody has it.
        ready: the host has seen that the rows are there, as it has when it has read their numbers, which were made
            behind them. So they travel at once, under what the device has been given to compute since.

    Returns:
        [sum(receive), ...], on one rank the rows themselves.

    Raises:
        PipelineRuntimeError: a rank was lost, or nothing came in time.
    """
    if group.size() == 1:
        return rows
    stream = stream or shared_stream(rows.device)
    return _Exchange.apply(rows, tuple(send), tuple(receive), ready, group, tickets, stream)


class _Kept(Protocol):
    """What a forward leaves to its backward."""

    splits: tuple[Sequence[int], Sequence[int]]
    route: tuple[dist.ProcessGroup, Tickets | None, SharedStream]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Kept,
        rows: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        ready: bool,
        group: dist.ProcessGroup,
        tickets: Tickets | None,
        stream: SharedStream,
    ) -> Tensor:
        ctx.splits, ctx.route = (receive, send), (group, tickets, stream)
        return _post(rows, send, receive, ready, group, tickets, stream)

    @staticmethod
    def backward(ctx: _Kept, grad: Tensor) -> tuple[Tensor | None, ...]:
        send, receive = ctx.splits
        return _post(grad, send, receive, False, *ctx.route), None, None, None, None, None, None


def _post(
    rows: Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    ready: bool,
    group: dist.ProcessGroup,
    tickets: Tickets | None,
    stream: SharedStream,
) -> Tensor:
    ready = ready and rows.is_contiguous() and rows.device.type != "cpu"
    rows = rows.contiguous()
    # What the current stream frees may still be in use there: memory for what does not wait for it is another stream's.
    with stream.side.running() if ready else nullcontext():
        out = rows.new_empty((sum(receive), *rows.shape[1:]))
    what = f"all-to-all of group rank {group.rank()}"
    ticket = stream.posts.all_to_all(group, out, rows, receive, send, what, not ready)
    if tickets is None:
        with waiting():
            ticket.wait(TIMEOUT_S)
    else:
        tickets.add(ticket, rows.nbytes)
    return out


class Counts:
    """Numbers of rows that a rank sends and receives, on the device and, after `wait`, on the host.

    Args:
        sent: [ranks * each] int64; rows of this rank for each expert, say, of every rank.
        group: the ranks; the numbers travel beside its rows, see `beside`.
        tickets: takes the ticket of the exchange; its `wait` brings the numbers to the host. None: wait here.
        stream: posts it.

    Attributes:
        both: [2, ranks, each], those that this rank sends and those that it receives.
        send: rows for each rank.
        receive: rows from each rank.
        expected: [each], rows that arrive here for each expert.
    """

    send: list[int]
    receive: list[int]
    expected: list[int]

    def __init__(self, sent: Tensor, group: dist.ProcessGroup, tickets: Tickets | None, stream: SharedStream) -> None:
        ranks = group.size()
        self.both = torch.stack([sent, torch.empty_like(sent)]).view(2, ranks, -1)
        self._stream = stream
        each = [1] * ranks
        what = f"all-to-all of counts of group rank {group.rank()}"
        self._ticket = stream.counts.all_to_all(beside(group), self.both[1], self.both[0], each, each, what)
        if tickets is None:
            self.wait(TIMEOUT_S)
        else:
            tickets.add(self, sent.nbytes)

    def wait(self, timeout_s: float) -> None:
        """Bring the numbers to the host: of a MoE layer, forward and backward, the one wait of the host for the device.
        The copy follows the exchange alone, while the device goes on with what it has been given before."""
        self._ticket.wait(timeout_s)
        sent, received = self._stream.side.to_host(self.both, partial(self._ticket.wait, timeout_s)).tolist()
        self.send, self.receive = [sum(each) for each in sent], [sum(each) for each in received]
        self.expected = [sum(each) for each in zip(*received, strict=True)]

    def done(self) -> bool:
        return self._ticket.done()

    def finished_at(self) -> float | None:
        return self._ticket.finished_at()

    def moments(self) -> Moments | None:
        return self._ticket.moments()
