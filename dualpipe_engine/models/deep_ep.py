"""Dispatch and combine through DeepEP (github.com/deepseek-ai/DeepEP), where it is installed.

A token travels once to each rank that has any of its experts; weights are applied and a rank's results added up there.
Not run by the tests: DeepEP needs several GPUs with NVLink or RDMA.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm.tickets import Tickets
from .dispatch import State
from .routing import Routing


def deep_ep_available(group: dist.ProcessGroup) -> bool:
    """Whether DeepEP can serve the group: NCCL, and the package is there."""
    if dist.get_backend(group) != "nccl":
        return False
    try:
        import deep_ep  # noqa: F401
    except ImportError:
        return False
    return True


class DeepEP:
    """A `Dispatcher` on a DeepEP buffer.

    Args:
        group: the ranks that share the experts.
        num_experts: of all ranks.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self._group = group
        self._num_experts = num_experts
        self._buffer: Any = None

    def prepare(self, x: Tensor, routing: Routing) -> State:
        return {"rows": x, "weights": routing.weights.float(), "experts": routing.experts}

    def dispatch(self, state: State, tickets: Tickets | None) -> State:
        buffer = self._sized(state["rows"])
        experts = state.pop("experts")
        call = _Call(buffer, tickets)
        rows, weights, chosen, handle = _Dispatch.apply(
            state["rows"], state["weights"], experts, self._num_experts, call
        )
        return state | {"rows": rows, "weights": weights, "chosen": chosen, "handle": handle}

    def arrange(self, state: State) -> tuple[Tensor, list[int]]:
        place = (state["chosen"] >= 0).flatten().nonzero().squeeze(1)  # of -1: an expert of another rank
        expert = state["chosen"].flatten()[place]
        state["place"] = place[expert.argsort(stable=True)]
        local = self._num_experts // self._group.size()
        rows = state["rows"].index_select(0, state["place"] // state["chosen"].shape[1])
        return rows, torch.bincount(expert, minlength=local).tolist()

    def restore(self, state: State, rows: Tensor) -> State:
        place, before = state.pop("place"), state["rows"]
        token = place // state.pop("chosen").shape[1]
        weighted = rows * state.pop("weights").flatten()[place].to(rows.dtype).unsqueeze(1)
        return state | {"rows": rows.new_zeros(before.shape).index_add(0, token, weighted)}

    def combine(self, state: State, tickets: Tickets | None) -> State:
        handle = state.pop("handle")
        rows = _Combine.apply(state["rows"], handle, _Call(self._sized(state["rows"]), tickets))
        return state | {"rows": rows}

    def finish(self, state: State) -> Tensor:
        rows: Tensor = state["rows"]
        return rows

    def _sized(self, rows: Tensor) -> Any:
        """The buffer, made for the size of the first rows."""
        if self._buffer is None:
            from deep_ep import Buffer

            size, ranks = rows.shape[1] * rows.element_size(), self._group.size()
            configs = (Buffer.get_dispatch_config(ranks), Buffer.get_combine_config(ranks))
            nvlink = max(config.get_nvl_buffer_size_hint(size, ranks) for config in configs)
            rdma = max(config.get_rdma_buffer_size_hint(size, ranks) for config in configs)
            self._buffer = Buffer(self._group, nvlink, rdma)
        return self._buffer


class _Call:
    """A buffer, and who waits for what it does."""

    def __init__(self, buffer: Any, tickets: Tickets | None) -> None:
        self.buffer, self._tickets = buffer, tickets

    def options(self) -> dict[str, Any]:
        """Follow the current stream, and return an event."""
        from deep_ep import Buffer

        return {"previous_event": Buffer.capture(), "async_finish": True}

    def posted(self, event: Any, *kept: Any) -> None:
        ticket = _EventTicket(event, kept)
        if self._tickets is None:
            ticket.wait(0.0)
        else:
            self._tickets.add(ticket, sum(each.nbytes for each in kept if isinstance(each, Tensor)))


class _EventTicket:
    def __init__(self, event: Any, kept: Any) -> None:
        self._event, self._kept = event, kept

    def wait(self, timeout_s: float) -> None:
        self._event.current_stream_wait()
        self._kept = None

    def done(self) -> bool:
        return True  # waiting costs the host nothing

    def finished_at(self) -> float | None:
        return None


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, experts: Tensor, num_experts: int, call: _Call) -> Any:
        buffer = call.buffer
        per_rank, per_node, per_expert, inside, _ = buffer.get_dispatch_layout(experts, num_experts)
        out, chosen, coming, _, handle, event = buffer.dispatch(
            rows,
            topk_idx=experts,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=inside,
            num_tokens_per_expert=per_expert,
            **call.options(),
        )
        call.posted(event, rows, weights)
        ctx.handle, ctx.call = handle, call
        ctx.mark_non_differentiable(chosen)
        return out, coming, chosen, handle

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        rows, weights = grads[0].contiguous(), grads[1].float().contiguous()
        back, back_weights, event = ctx.call.buffer.combine(
            rows, ctx.handle, topk_weights=weights, **ctx.call.options()
        )
        ctx.call.posted(event, rows, weights)
        return back, back_weights, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, handle: Any, call: _Call) -> Tensor:
        out, _, event = call.buffer.combine(rows, handle, **call.options())
        call.posted(event, rows)
        ctx.handle, ctx.call = handle, call
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        rows = grads[0].contiguous()
        back, _, _, _, _, event = ctx.call.buffer.dispatch(rows, handle=ctx.handle, **ctx.call.options())
        ctx.call.posted(event, rows)
        return back, None, None
