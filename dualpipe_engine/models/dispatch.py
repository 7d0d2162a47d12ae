"""Dispatch and combine: rows travel to the ranks of their experts and back.

A dispatcher works on the state of a layer, a dictionary; computation and communication are apart, so that they can be
phases:

    prepare (compute) -> count (comm) -> dispatch (comm) -> arrange (compute) -> experts -> restore (compute)
    -> combine (comm) -> finish (compute)
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm.all_to_all import Counts, exchange
from ..comm.stream import SharedStream, shared_stream
from ..comm.tickets import Tickets
from .experts import Sizes
from .routing import Routing

State = dict[str, Any]


class Dispatcher(Protocol):
    """Moves rows between the ranks that share experts. `tickets` None: wait at once."""

    def prepare(self, x: Tensor, routing: Routing) -> State:
        """What has to travel, of tokens `x [tokens, hidden]`."""

    def count(self, state: State, tickets: Tickets | None) -> State:
        """Find out how many rows come from where."""

    def dispatch(self, state: State, tickets: Tickets | None) -> State:
        """Send rows to the ranks of their experts."""

    def arrange(self, state: State) -> tuple[Tensor, Sizes]:
        """The received rows sorted by expert, `[rows, hidden]`, and how many each expert of this rank has."""

    def restore(self, state: State, rows: Tensor) -> State:
        """Put the experts' results into the order in which they travel back."""

    def combine(self, state: State, tickets: Tickets | None) -> State:
        """Send results back."""

    def finish(self, state: State) -> Tensor:
        """The weighted sum over the experts of each token, `[tokens, hidden]`."""


class AllToAll:
    """One row for each token and expert, none dropped, by all-to-all of a torch process group.

    How many rows come from where is exchanged before the rows: 8 bytes for each expert and rank.

    Args:
        group: the ranks that share the experts; None: this rank has all.
        num_experts: of all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None, num_experts: int) -> None:
        self._group = group
        self._ranks = 1 if group is None else group.size()
        self._num_local = num_experts // self._ranks
        self._stream: SharedStream | None = None

    def prepare(self, x: Tensor, routing: Routing) -> State:
        flat = routing.experts.flatten()
        order = flat.argsort(stable=True)
        token = order // routing.experts.shape[1]
        return {
            "rows": x.index_select(0, token),
            "weights": routing.weights.flatten().index_select(0, order),
            "token": token,
            "tokens": x.shape[0],
            "counts": routing.counts,
        }

    def count(self, state: State, tickets: Tickets | None) -> State:
        if self._group is None or self._ranks == 1:
            return state
        if self._stream is None:
            self._stream = shared_stream(state["counts"].device)
        return state | {"counts": Counts(state["counts"], self._group, tickets, self._stream)}

    def dispatch(self, state: State, tickets: Tickets | None) -> State:
        if self._group is None or self._ranks == 1:
            return state
        counts: Counts = state["counts"]  # of the same rows: see `prepare`
        return state | {
            "rows": exchange(state["rows"], counts.send, counts.receive, self._group, tickets, self._stream, ready=True)
        }

    def arrange(self, state: State) -> tuple[Tensor, Sizes]:
        rows, counts = state["rows"], state["counts"]
        if self._ranks == 1:
            return rows, Sizes(counts)
        coming = counts.both[1]
        local = torch.arange(self._num_local, device=rows.device).repeat(self._ranks)
        expert = local.repeat_interleave(coming.flatten(), output_size=len(rows))
        state["order"] = expert.argsort(stable=True)
        return rows.index_select(0, state["order"]), Sizes(coming.sum(dim=0), counts.expected)

    def restore(self, state: State, rows: Tensor) -> State:
        if self._ranks > 1:
            rows = rows.index_select(0, state.pop("order").argsort())
        return state | {"rows": rows}

    def combine(self, state: State, tickets: Tickets | None) -> State:
        if self._group is None or self._ranks == 1:
            return state
        counts: Counts = state.pop("counts")
        return state | {
            "rows": exchange(state["rows"], counts.receive, counts.send, self._group, tickets, self._stream)
        }

    def finish(self, state: State) -> Tensor:
        rows: Tensor = state["rows"]
        weighted = rows * state["weights"].to(rows.dtype).unsqueeze(1)
        return rows.new_zeros(state["tokens"], rows.shape[1]).index_add(0, state["token"], weighted)
