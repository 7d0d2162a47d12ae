"""All-to-all over rows, differentiable, and posted rather than waited for where a `Tickets` is given.

Expert parallelism sends each token to the ranks of its experts and back (DeepSeek-V3 report, section 3.2.1: "dispatch"
and "combine"). The backward of one is the other with the splits exchanged.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import PipelineRuntimeError
from .tickets import Tickets

TIMEOUT_S = 600.0  #: of an exchange that nobody overlaps


def exchange(
    rows: torch.Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    group: dist.ProcessGroup,
    tickets: Tickets | None = None,
) -> torch.Tensor:
    """Send consecutive blocks of rows to the ranks of a group and receive theirs.

    Args:
        rows: [sum(send), ...]; block i goes to group rank i.
        send: rows for each rank.
        receive: rows from each rank.
        group: the ranks.
        tickets: takes the ticket, of the backward too; the result (the gradient) holds no data before its `wait`. The
            rows must then be used by nothing else that backward adds up. None: wait here.

    Returns:
        [sum(receive), ...], on one rank the rows themselves.

    Raises:
        PipelineRuntimeError: a rank was lost, or nothing came in time.
    """
    if group.size() == 1:
        return rows
    return _Exchange.apply(rows, tuple(send), tuple(receive), group, tickets)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, send: Any, receive: Any, group: Any, tickets: Any) -> torch.Tensor:
        ctx.splits, ctx.group, ctx.tickets = (receive, send), group, tickets
        return _post(rows, send, receive, group, tickets)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        send, receive = ctx.splits
        return _post(grads[0], send, receive, ctx.group, ctx.tickets), None, None, None, None


def _post(rows: torch.Tensor, send: Any, receive: Any, group: Any, tickets: Tickets | None) -> torch.Tensor:
    rows = rows.contiguous()
    out = rows.new_empty((sum(receive), *rows.shape[1:]))
    work = dist.all_to_all_single(out, rows, list(receive), list(send), group=group, async_op=True)
    ticket = _Ticket(work, rows, out)
    if tickets is None:
        ticket.wait(TIMEOUT_S)
    else:
        tickets.add(ticket, rows.nbytes)
    return out


class _Ticket:
    """One all-to-all; keeps both tensors until it is done."""

    def __init__(self, work: Any, rows: torch.Tensor, out: torch.Tensor) -> None:
        self._work = work
        self._kept: Any = (rows, out)
        self._finished: float | None = None
        if out.device.type == "cpu":
            work.get_future().add_done_callback(self._stamp)

    def _stamp(self, _: Any) -> None:
        self._finished = time.monotonic()

    def wait(self, timeout_s: float) -> None:
        try:
            self._work.wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise PipelineRuntimeError(f"all-to-all failed: {error}") from error
        self._kept = None

    def done(self) -> bool:
        return bool(self._work.is_completed())

    def finished_at(self) -> float | None:
        return self._finished
