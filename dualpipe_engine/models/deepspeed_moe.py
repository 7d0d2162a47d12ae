"""Phases for `deepspeed.moe.layer.MoE` inside a block of one's own."""

from __future__ import annotations

from collections.abc import Callable

from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer, _route_slots, _sparse_decode, _sparse_encode
from torch import Tensor
from torch.nn import functional

from ..comm.all_to_all import exchange
from ..comm.nest import Nest
from ..comm.stream import SharedStream, shared_stream
from ..comm.tickets import Tickets
from ..errors import ConfigError
from ..runtime.phases import COMM, COMPUTE, Phase

State = dict[str, Nest]


def moe_phases(
    moe: MoE,
    enter: Callable[[Nest], tuple[Nest, Tensor]],
    leave: Callable[[Nest, Tensor, Tensor, Tensor], Nest],
) -> list[Phase]:
    """What a block with one MoE layer returns from its `phases()`.

    Together the phases compute `leave(carried, *moe(hidden))` with `carried, hidden = enter(state)`, which is what the
    block's `forward` should do.

    Args:
        moe: the layer.
        enter: the block up to the layer; `carried` is any nest of tensors and plain values.
        leave: the block after it, given `carried`, the layer's output, its auxiliary loss and its counts.

    Raises:
        ConfigError: the layer uses Tutel.
    """
    if moe.deepspeed_moe.use_tutel:
        raise ConfigError("a MoE layer with use_tutel has no phases: build it without, or run the block whole")
    parts = _Parts(moe, enter, leave)
    return [
        Phase("gate", COMPUTE, parts.gate),
        Phase("dispatch", COMM, parts.travel),
        Phase("experts", COMPUTE, parts.experts),
        Phase("combine", COMM, parts.travel),
        Phase("sum", COMPUTE, parts.finish),
    ]


class _Parts:
    """`MOELayer.forward` in five steps, without tensor parallelism."""

    def __init__(self, moe: MoE, enter: Callable[..., Nest], leave: Callable[..., Nest]) -> None:
        self._moe = moe
        self._layer: MOELayer = moe.deepspeed_moe
        self._enter, self._leave = enter, leave
        self._stream: SharedStream | None = None

    def gate(self, state: Nest) -> State:
        carried, hidden = self._enter(state)
        rows = hidden.reshape(-1, hidden.shape[-1])
        loss, capacity, experts, indices, places, weights, counts = self._layer.gate(rows, None, True, False)
        self._layer.l_aux, self._layer.exp_counts = loss.detach(), counts  # as its forward does
        slots = _route_slots(indices, places, experts, int(capacity))
        sent = _sparse_encode(rows, slots, experts, int(capacity)).contiguous()
        kept = {"carried": carried, "weights": weights, "slots": slots, "loss": loss, "counts": counts}
        return kept | {"rows": sent, "hidden": hidden if self._moe.use_residual else None, "shape": tuple(hidden.shape)}

    def travel(self, state: State, tickets: Tickets | None) -> State:
        group = self._layer.ep_group
        if self._stream is None and group.size() > 1:
            self._stream = shared_stream(state["rows"].device)
        each = [len(state["rows"]) // group.size()] * group.size()
        return state | {"rows": exchange(state["rows"], each, each, group, tickets, self._stream)}

    def experts(self, state: State) -> State:
        rows, layer = state["rows"], self._layer
        width = rows.shape[-1]
        out = layer.experts(rows.reshape(layer.ep_size, layer.num_local_experts, -1, width))
        return state | {"rows": out.reshape(layer.ep_size * layer.num_local_experts, -1, width)}

    def finish(self, state: State) -> Nest:
        shape = state["shape"]
        rows = state["rows"].reshape(-1, shape[-1])
        out = _sparse_decode(rows, state["slots"], state["weights"], state["slots"].shape[1]).reshape(shape)
        if self._moe.use_residual:
            own = self._moe.mlp(state["hidden"])
            own = own[0] if isinstance(own, tuple) else own
            share = functional.softmax(self._moe.coefficient(state["hidden"]), dim=-1)
            out = out * share[..., 0:1] + own * share[..., 1:]
        return self._leave(state["carried"], out, state["loss"], state["counts"])
