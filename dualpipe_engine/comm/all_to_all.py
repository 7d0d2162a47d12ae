"""All-to-all over rows, differentiable, and posted rather than waited for where a `Tickets` is given.

Expert parallelism sends each token to the ranks of its experts and back (DeepSeek-V3 report, section 3.2.1: "dispatch"
and "combine"). The backward of one is the other with the splits exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from .position import waiting
from .stream import CommStream, open_stream
from .tickets import Tickets

TIMEOUT_S = 600.0  #: of an exchange that nobody overlaps


def exchange(
    rows: torch.Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    group: dist.ProcessGroup,
    tickets: Tickets | None = None,
    stream: CommStream | None = None,
) -> torch.Tensor:
    """Send consecutive blocks of rows to the ranks of a group and receive theirs.

    Args:
        rows: [sum(send), ...]; block i goes to group rank i.
        send: rows for each rank.
        receive: rows from each rank.
        group: the ranks.
        tickets: takes the ticket, of the backward too; the result (the gradient) holds no data before its `wait`. The
            rows must then be used by nothing else that backward adds up. None: wait here.
        stream: posts it, and the backward; None: one for this exchange.

    Returns:
        [sum(receive), ...], on one rank the rows themselves.

    Raises:
        PipelineRuntimeError: a rank was lost, or nothing came in time.
    """
    if group.size() == 1:
        return rows
    return _Exchange.apply(rows, tuple(send), tuple(receive), group, tickets, stream or open_stream(rows.device))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, send: Any, receive: Any, *route: Any) -> torch.Tensor:
        ctx.splits, ctx.route = (receive, send), route
        return _post(rows, send, receive, *route)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        send, receive = ctx.splits
        return _post(grads[0], send, receive, *ctx.route), None, None, None, None, None


def _post(
    rows: torch.Tensor, send: Any, receive: Any, group: Any, tickets: Tickets | None, stream: CommStream
) -> torch.Tensor:
    rows = rows.contiguous()
    out = rows.new_empty((sum(receive), *rows.shape[1:]))
    ticket = stream.all_to_all(group, out, rows, receive, send, f"all-to-all of group rank {group.rank()}")
    if tickets is None:
        with waiting():
            ticket.wait(TIMEOUT_S)
    else:
        tickets.add(ticket, rows.nbytes)
    return out
