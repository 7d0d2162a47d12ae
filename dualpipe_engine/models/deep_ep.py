"""Dispatch and combine through DeepEP (github.com/deepseek-ai/DeepEP), where it is installed.

A token travels once to each rank that has any of its experts; weights are applied and a rank's results added up there.
DeepEP counts what each rank and expert gets while it dispatches, and tells the host, which waits for that: it is the
one wait of the layer. Both of its interfaces serve: `Buffer`, and `EPBuffer` or `ElasticBuffer` of version 2.

Not run by the tests but against a stand-in: DeepEP needs several GPUs with NVLink or RDMA.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm.device import EventMoment, on_stream
from ..comm.tickets import Moments, Tickets
from ..errors import PipelineRuntimeError
from .dispatch import State
from .experts import Sizes
from .routing import Routing, count


def deep_ep_available(group: dist.ProcessGroup) -> bool:
    """Whether DeepEP can serve the group: NCCL, and the package is there."""
    if dist.get_backend(group) != "nccl":
        return False
    try:
        import deep_ep  # noqa: F401
    except ImportError:
        return False
    return True


def deep_ep_installed() -> bool:
    """Whether version 2 of DeepEP is there."""
    try:
        import deep_ep
    except ImportError:
        return False
    return _kind_of(deep_ep) is not None


def _kind_of(library: ModuleType) -> Callable[..., object] | None:
    """The buffer of version 2, whatever its name."""
    return getattr(library, "EPBuffer", None) or getattr(library, "ElasticBuffer", None)


class Limits(NamedTuple):
    """What a buffer may take, in version 2.

    Args:
        tokens: of a rank in one dispatch, for which there is room from the start; more are refused. The buffers of all
            ranks must be made at once, which those that grow with what one rank sees cannot promise.
        sms: streaming multiprocessors of a kernel; 0: DeepEP's choice.
        queue_pairs: of the network; 0: DeepEP's choice.
    """

    tokens: int = 0
    sms: int = 0
    queue_pairs: int = 0


NO_LIMITS = Limits()


Handle: TypeAlias = Any
"""What DeepEP knows of a dispatch, and wants again for the way back: another object in each version."""


class Event(Protocol):
    """DeepEP's; streams can wait for it, but the host cannot ask it."""

    def current_stream_wait(self) -> None: ...


Grads = tuple[Tensor | None, ...]  #: one for each argument of the forward

#: Rows, local experts (-1: of another rank), weights, rows of each expert, handle, event.
Dispatched = tuple[Tensor, Tensor, Tensor, Sequence[int], Handle, Event]


class Buffer(Protocol):
    """A buffer of DeepEP, of either version. All calls go on at once; their events tell when they are done."""

    def fit(self, rows: Tensor, top_k: int) -> None:
        """Make room for rows `[tokens, hidden]` like these. Collective when it has to."""

    def layout(self, experts: Tensor, num_experts: int) -> dict[str, object]:
        """What `dispatch` wants to know of `experts [tokens, top_k]`."""

    def dispatch(self, rows: Tensor, weights: Tensor, layout: dict[str, object]) -> Dispatched:
        """Send rows `[tokens, hidden]` with their weights `[tokens, top_k]`."""

    def dispatch_again(self, rows: Tensor, handle: Handle) -> tuple[Tensor, Event]:
        """Other rows on the same way: rows, event."""

    def combine(
        self, rows: Tensor, handle: Handle, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Event]:
        """The way back, added up: rows, weights, event."""


class _First:
    """`deep_ep.Buffer`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._buffer: Any = None
        self._size = 0

    def fit(self, rows: Tensor, top_k: int) -> None:
        size = rows.shape[1] * max(rows.element_size(), 2)
        if size <= self._size:
            return
        from deep_ep import Buffer

        ranks, self._size = self._group.size(), size
        configs = (Buffer.get_dispatch_config(ranks), Buffer.get_combine_config(ranks))
        nvlink = max(config.get_nvl_buffer_size_hint(size, ranks) for config in configs)
        rdma = max(config.get_rdma_buffer_size_hint(size, ranks) for config in configs)
        self._buffer = Buffer(self._group, nvlink, rdma)

    def layout(self, experts: Tensor, num_experts: int) -> dict[str, object]:
        per_rank, per_node, per_expert, inside, _ = self._buffer.get_dispatch_layout(experts, num_experts)
        return {
            "topk_idx": experts,
            "num_tokens_per_rank": per_rank,
            "num_tokens_per_rdma_rank": per_node,
            "is_token_in_rank": inside,
            "num_tokens_per_expert": per_expert,
        }

    def dispatch(self, rows: Tensor, weights: Tensor, layout: dict[str, object]) -> Dispatched:
        out, chosen, coming, sizes, handle, event = self._buffer.dispatch(
            rows, topk_weights=weights, async_finish=True, **layout
        )
        return out, chosen, coming, sizes, handle, event

    def dispatch_again(self, rows: Tensor, handle: Handle) -> tuple[Tensor, Event]:
        out, _, _, _, _, event = self._buffer.dispatch(rows, handle=handle, async_finish=True)
        return out, event

    def combine(
        self, rows: Tensor, handle: Handle, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Event]:
        out, back, event = self._buffer.combine(rows, handle, topk_weights=weights, async_finish=True)
        return out, back, event


class _Second:
    """`deep_ep.EPBuffer`, or `ElasticBuffer` as it was called before."""

    def __init__(self, group: dist.ProcessGroup, kind: Callable[..., object], limits: Limits) -> None:
        self._group, self._kind, self._limits = group, kind, limits
        self._sms = {"num_sms": limits.sms} if limits.sms else {}
        self._buffer: Any = None
        self._room = (0, 0, 0)

    def fit(self, rows: Tensor, top_k: int) -> None:
        room, most = self._room, self._limits.tokens
        if most and len(rows) > most:
            raise PipelineRuntimeError(
                f"a rank has {len(rows)} tokens to dispatch, but comm_max_tokens_per_rank is {most}: raise it"
            )
        needed = (max(room[0], len(rows), most), max(room[1], rows.shape[1]), max(room[2], top_k))
        if needed == room:
            return
        self._room = tokens, hidden, top_k = needed
        more = {"num_allocated_qps": self._limits.queue_pairs} if self._limits.queue_pairs else {}
        self._buffer = self._kind(self._group, num_max_tokens_per_rank=tokens, hidden=hidden, num_topk=top_k, **more)

    def layout(self, experts: Tensor, num_experts: int) -> dict[str, object]:
        return {"topk_idx": experts, "num_experts": num_experts}

    def dispatch(self, rows: Tensor, weights: Tensor, layout: dict[str, object]) -> Dispatched:
        out, chosen, coming, handle, event = self._buffer.dispatch(
            rows, topk_weights=weights, async_with_compute_stream=True, **layout, **self._sms
        )
        return out, chosen, coming, handle.num_recv_tokens_per_expert_list, handle, event

    def dispatch_again(self, rows: Tensor, handle: Handle) -> tuple[Tensor, Event]:
        options = {"num_sms": handle.num_sms, "async_with_compute_stream": True}
        out, _, _, _, event = self._buffer.dispatch(rows, handle=handle, **options)
        return out, event

    def combine(
        self, rows: Tensor, handle: Handle, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Event]:
        options = {"async_with_compute_stream": True, **self._sms}
        out, back, event = self._buffer.combine(rows, handle, topk_weights=weights, **options)
        return out, back, event


class _Shared:
    """What all layers of a group have in common: the buffer, and a stream that sees when its work is done."""

    def __init__(self, group: dist.ProcessGroup, limits: Limits) -> None:
        import deep_ep

        kind = _kind_of(deep_ep)
        self.group = group
        self.buffer: Buffer = _First(group) if kind is None else _Second(group, kind, limits)
        self.seen: torch.Stream | None = None

    def stream(self, device: torch.device) -> torch.Stream:
        if self.seen is None:
            self.seen = torch.Stream(device)
        return self.seen


_SHARED: weakref.WeakValueDictionary[dist.ProcessGroup, _Shared] = weakref.WeakValueDictionary()


class DeepEP:
    """A `Dispatcher` on the DeepEP buffer of its group, which lives as long as the dispatchers that share it.

    Args:
        group: the ranks that share the experts.
        num_experts: of all ranks.
        limits: of the buffer; those of the first dispatcher of a group count.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int, limits: Limits = NO_LIMITS) -> None:
        shared = _SHARED.get(group)
        if shared is None:
            shared = _SHARED[group] = _Shared(group, limits)
        self._shared = shared
        self._num_experts = num_experts
        self._num_local = num_experts // group.size()

    def prepare(self, x: Tensor, routing: Routing) -> State:
        self._shared.buffer.fit(x, routing.experts.shape[1])
        layout = self._shared.buffer.layout(routing.experts, self._num_experts)
        return {"rows": x, "weights": routing.weights.float(), "way": _Way(layout)}

    def count(self, state: State, tickets: Tickets | None) -> State:
        return state  # `dispatch` counts, and waits for it

    def dispatch(self, state: State, tickets: Tickets | None) -> State:
        way: _Way = state["way"]
        rows, weights = _Dispatch.apply(state["rows"], state["weights"], way, _Call(self._shared, tickets))
        return state | {"rows": rows, "weights": weights}

    def arrange(self, state: State) -> tuple[Tensor, Sizes]:
        way: _Way = state["way"]
        expert = way.chosen.flatten()
        expert = expert.masked_fill(expert < 0, self._num_local).long()  # of another rank: behind all others
        place = expert.argsort(stable=True)[: sum(way.sizes)]
        rows = state["rows"].index_select(0, place // way.chosen.shape[1])
        state["place"] = place
        return rows, Sizes(count(expert, self._num_local + 1)[: self._num_local], way.sizes)

    def restore(self, state: State, rows: Tensor) -> State:
        place, before = state.pop("place"), state["rows"]
        token = place // state["way"].chosen.shape[1]
        weighted = rows * state.pop("weights").flatten()[place].to(rows.dtype).unsqueeze(1)
        return state | {"rows": rows.new_zeros(before.shape).index_add(0, token, weighted)}

    def combine(self, state: State, tickets: Tickets | None) -> State:
        way: _Way = state.pop("way")
        return state | {"rows": _Combine.apply(state["rows"], way, _Call(self._shared, tickets))}

    def finish(self, state: State) -> Tensor:
        rows: Tensor = state["rows"]
        return rows


class _Way:
    """Where the tokens of one micro-batch go.

    Attributes:
        layout: what the dispatch takes beside rows and weights.
        chosen: [received tokens, top_k], local experts; -1 for one of another rank.
        sizes: rows of each expert of this rank, as DeepEP has counted them.
        handle: of the dispatch.
    """

    chosen: Tensor
    sizes: list[int]
    handle: Handle

    def __init__(self, layout: dict[str, object]) -> None:
        self.layout: dict[str, object] = layout


class _Call:
    """One use of the buffer, and who waits for it."""

    def __init__(self, shared: _Shared, tickets: Tickets | None) -> None:
        self.buffer, self._shared, self._tickets = shared.buffer, shared, tickets

    def begin(self, rows: Tensor) -> None:
        self._posted = EventMoment(torch.accelerator.current_stream(rows.device))

    def end(self, event: Event, *kept: Tensor) -> None:
        ticket = _EventTicket(event, self._posted, self._shared.stream(kept[0].device), kept)
        if self._tickets is None:
            ticket.wait(0.0)
        else:
            self._tickets.add(ticket, sum(each.nbytes for each in kept))


class _EventTicket:
    """A call under way.

    Args:
        event: of DeepEP.
        posted: the moment before the call.
        seen: a stream that follows the event, to ask that.
        kept: tensors that live until somebody has waited.
    """

    def __init__(self, event: Event, posted: EventMoment, seen: torch.Stream, kept: tuple[Tensor, ...]) -> None:
        self._posted = posted
        self._needed: tuple[Event, tuple[Tensor, ...]] | None = (event, kept)
        with on_stream(seen):
            event.current_stream_wait()
            self._finished = EventMoment(seen)
        self._stood: tuple[EventMoment, EventMoment] | None = None
        self._device = seen.device

    def wait(self, timeout_s: float) -> None:
        current = torch.accelerator.current_stream(self._device)
        stopped = EventMoment(current)
        self._finished.block(current)
        self._stood = self._stood or (stopped, EventMoment(current))
        self._needed = None

    def done(self) -> bool:
        return self._finished.happened()

    def finished_at(self) -> float | None:
        return None

    def moments(self) -> Moments | None:
        return (self._posted, self._finished, *(self._stood or (None, None)))


class _Kept(Protocol):
    """What a forward leaves to its backward."""

    handle: Handle
    call: _Call


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Kept, rows: Tensor, weights: Tensor, way: _Way, call: _Call) -> tuple[Tensor, Tensor]:
        call.begin(rows)
        out, way.chosen, coming, sizes, way.handle, event = call.buffer.dispatch(rows, weights, way.layout)
        way.layout, way.sizes = {}, list(sizes)
        call.end(event, rows, weights)
        ctx.handle, ctx.call = way.handle, call
        return out, coming

    @staticmethod
    def backward(ctx: _Kept, of_rows: Tensor, of_weights: Tensor) -> Grads:
        rows, weights = of_rows.contiguous(), of_weights.float().contiguous()
        ctx.call.begin(rows)
        back, back_weights, event = ctx.call.buffer.combine(rows, ctx.handle, weights)
        ctx.call.end(event, rows, weights)
        return back, back_weights, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Kept, rows: Tensor, way: _Way, call: _Call) -> Tensor:
        call.begin(rows)
        out, _, event = call.buffer.combine(rows, way.handle)
        call.end(event, rows)
        ctx.handle, ctx.call = way.handle, call
        return out

    @staticmethod
    def backward(ctx: _Kept, grad: Tensor) -> Grads:
        rows = grad.contiguous()
        ctx.call.begin(rows)
        back, event = ctx.call.buffer.dispatch_again(rows, ctx.handle)
        ctx.call.end(event, rows)
        return back, None, None
