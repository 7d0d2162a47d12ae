"""DeepSpeed's `AutoEPMoELayer` in steps, of which those that communicate can be phases.

    route (compute) -> count (comm) -> dispatch (comm) -> compute (compute) -> combine (comm) -> finish (compute)

What is computed is DeepSpeed's, function by function; how rows travel is this package's: their numbers go ahead, and
nothing is waited for where somebody else will (`comm.all_to_all`). With "comm_backend": "deepep" they travel by DeepEP
(`models.deep_ep`), which applies weights and adds up where the experts are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_comm import COMM_BACKEND, DEEPEP_BACKEND
from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
from deepspeed.module_inject.auto_ep_layer import (
    AutoEPMoELayer,
    apply_scores_before_experts_if_enabled,
    combine_from_routed,
    permute_by_local_expert,
    unpermute_by_local_expert,
)
from torch import Tensor, nn

from ...comm.all_to_all import Counts, exchange
from ...comm.nest import Nest
from ...comm.stream import SharedStream, shared_stream
from ...comm.tickets import Tickets
from ..counting import Counting, counters
from ..deep_ep import DeepEP, Limits
from ..routing import Routing
from ..trial import having
from .weights import Unread, form_of

State = dict[str, Any]


class Reached(BaseException):
    """Ends a forward at the layer that it has come to. No Exception, so that nothing on the way catches it.

    Args:
        hidden: what the layer was given, `[batch, length, hidden]`.
    """

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class SharedMoE(Counting, AutoEPMoELayer):
    """A MoE block whose experts are shared by ranks.

    A state dict is that of this rank, in DeepSpeed's names; where the block is `whole` it is what the block would have
    without sharing. Both load.

    Args:
        spec: of the block, by DeepSpeed's parser.
        source: the block.
        size: ranks that share the experts.
        rank: of these, the number of this one.
        config: the "expert_parallel" section.

    Attributes:
        form: how the state dict of the block that was replaced has its weights.
    """

    def __init__(self, spec: MoELayerSpec, source: nn.Module, size: int, rank: int, config: AutoEPConfig) -> None:
        super().__init__(spec, source, size, rank, config, deepep_scope=0)  # without a buffer of DeepEP to share
        for name in [name for name, part in self._modules.items() if part is self.router and name != "router"]:
            delattr(self, name)  # for recorders of whole models
        for buffer, zeros in counters(spec.num_experts, self.tokens_per_expert.device):
            self.register_buffer(buffer, zeros, persistent=False)
        self.form = form_of(spec, source)
        self._whole: dict[str, Tensor] | None = None
        self._stream: SharedStream | None = None
        self._asks_deep_ep = config.comm_backend == DEEPEP_BACKEND
        self.comm_backend = COMM_BACKEND  # of DeepSpeed's own forward
        self._deep_ep: DeepEP | None = None
        self._stops = self._by_itself = False

    @torch.no_grad()
    def take(self, layer: Unread, path: str) -> None:
        """Take the share of this rank from a layer that has read no experts.

        Args:
            layer: which holds the block that is replaced.
            path: of its module of experts, from the layer.
        """
        first = self.ep_rank * self.num_local_experts
        experts = range(first, first + self.num_local_experts)

        def read(names: list[str], some: range | None) -> dict[str, Tensor]:
            return layer.share(path, names, some, self.num_experts)

        own = (self.experts.w1, self.experts.w2, self.experts.w3)
        for param, value in zip(own, self.form.share(read, experts), strict=True):
            param.copy_(value)

    def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
        """Called when process groups can be had."""
        super().set_deepspeed_parallelism(*args, **kwargs)
        if self._asks_deep_ep:
            self.use_deep_ep(self.ep_group)

    def use_deep_ep(self, group: dist.ProcessGroup) -> None:
        """Let rows travel by DeepEP between the ranks of `group`."""
        limits = Limits(self.comm_max_tokens_per_rank, self.comm_num_sm, self.comm_num_sm + self.comm_qp_margin)
        self._deep_ep = DeepEP(group, self.num_experts, limits)

    def by_collectives(self) -> AbstractContextManager[None]:
        """Let rows travel by all-to-all, whose sums are always the same to the last bit."""
        return having(self, "_deep_ep", None)

    def stopping(self) -> AbstractContextManager[None]:
        """Let forwards that come here raise `Reached`."""
        return having(self, "_stops", True)

    def return_as(self, result: Nest) -> bool:
        """Return what the block returned.

        Args:
            result: `[batch, length, hidden]` or `[tokens, hidden]`, or a tuple of that and the logits of the router.

        Returns:
            Whether `result` is such.
        """
        output, *logits = result if isinstance(result, tuple) else (result,)
        self.moe_output_shape = "flat" if isinstance(output, Tensor) and output.dim() == 2 else "batched"
        self.return_router_logits, self.router_logits_capture_mode = bool(logits), "raw"
        self.router_logits_capture_target = "router"
        return len(logits) < 2 and all(isinstance(each, Tensor) for each in (output, *logits))

    @contextmanager
    def by_itself(self) -> Iterator[None]:
        """Let forwards be DeepSpeed's own, transfers included."""
        try:
            with having(self, "_by_itself", True):
                yield
        finally:
            self.tokens_per_expert.zero_()

    def _forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        if self._stops:
            raise Reached(hidden_states)
        if self._by_itself:
            own: Tensor | tuple[Tensor, Tensor | None] = super()._forward(hidden_states)
            return own
        state = self.dispatch(self.count(self.route(hidden_states), None), None)
        return self.finish(self.combine(self.compute(state), None))

    # -- state dicts -----------------------------------------------------------------------------------------------

    @contextmanager
    def whole(self, keep: bool) -> Iterator[None]:
        """Let `state_dict` hold all experts, under the names of the replaced block. Collective over `ep_group`.

        Args:
            keep: whether this rank needs them.
        """
        found: dict[str, Tensor] = {}
        for name, param in self.experts.named_parameters():
            parts = [param.detach().contiguous()]
            if self.ep_size > 1:
                parts = [torch.empty_like(param) for _ in range(self.ep_size)]
                dist.all_gather(parts, param.detach().contiguous(), group=self.ep_group)
            if keep:
                found[name] = torch.cat([part.cpu() for part in parts])
        self._whole = found if keep else None
        try:
            yield
        finally:
            self._whole = None

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        into, prefix = kwargs.pop("destination", None), kwargs.get("prefix", "")
        own: dict[str, Any] = super().state_dict(*args, **kwargs)
        if self._whole is not None:
            own.update({f"{prefix}experts.{name}": tensor for name, tensor in self._whole.items()})
            self.form.to_source(own, prefix)
        if into is None:
            return own
        into.update(own)
        return into  # type: ignore[no-any-return]

    def names_in_source(self) -> set[str]:
        """Entries of a state dict of the block that was replaced."""
        own = dict(super().state_dict())
        for name, param in self.experts.named_parameters():
            own[f"experts.{name}"] = torch.empty(self.num_experts, *param.shape[1:], device="meta")
        self.form.to_source(own, "")
        return set(own)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        self.form.from_source(state_dict, prefix)
        for name, _ in self.experts.named_parameters():
            given = state_dict.get(f"{prefix}experts.{name}")
            if given is not None and len(given) == self.num_experts:
                state_dict[f"{prefix}experts.{name}"] = given[self.ep_rank * self.num_local_experts :][
                    : self.num_local_experts
                ]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def with_experts(
        self, hidden: Tensor, run: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """What the block returns with other experts than its own, on this rank alone.

        Args:
            hidden: [batch, length, hidden].
            run: from rows `[rows, hidden]`, and the expert of each, to what it makes of them.
        """
        state = self.route(hidden)
        experts = torch.arange(self.num_experts, device=hidden.device).repeat_interleave(state["counts"])
        state = state | {"rows": run(state["rows"], experts)}
        return self.finish(state | ({} if self.shared_experts is None else {"shared": self._shared(state)}))

    # -- steps ---------------------------------------------------------------------------------------------------

    def route(self, hidden: Tensor) -> State:
        """Choose experts, and put the rows for each next to each other.

        Args:
            hidden: [batch, length, hidden].
        """
        x = hidden.reshape(-1, hidden.shape[-1])
        scores, experts, counts = self.router(x, self.expert_bias)
        self.note(counts)
        kept = {"hidden": hidden} if self.shared_experts is not None or self.return_router_logits else {}
        if self._deep_ep is not None:
            routing = Routing(experts, scores, None, counts)
            return self._deep_ep.prepare(x, routing) | {"shape": tuple(hidden.shape)} | kept
        order = torch.argsort(experts.view(-1), stable=True)
        rows = apply_scores_before_experts_if_enabled(
            x[order // self.top_k], scores.view(-1)[order], score_apply=self.score_apply
        )
        state = {"rows": rows, "scores": scores, "order": order, "counts": counts, "shape": tuple(hidden.shape)}
        return state | kept

    def count(self, state: State, tickets: Tickets | None) -> State:
        """Find out how many rows come from where."""
        if self._deep_ep is not None:
            return self._deep_ep.count(state, tickets)
        if self.ep_size == 1:
            return state
        if self._stream is None:
            self._stream = shared_stream(state["counts"].device)
        sent = state["counts"].to(torch.int64)
        return state | {"counts": Counts(sent, self.ep_group, tickets, self._stream)}

    def dispatch(self, state: State, tickets: Tickets | None) -> State:
        """Send rows to the ranks of their experts."""
        if self._deep_ep is not None:
            return self._deep_ep.dispatch(state, tickets)
        if self.ep_size == 1:
            return state
        counts: Counts = state["counts"]  # of the same rows: see `route`
        rows = exchange(state["rows"], counts.send, counts.receive, self.ep_group, tickets, self._stream, ready=True)
        return state | {"rows": rows}

    def compute(self, state: State) -> State:
        """Run the experts of this rank over what has come, and the shared ones over the tokens of this rank."""
        if self._deep_ep is not None:
            state = self._compute_weighted(state, self._deep_ep)
            return state | ({} if self.shared_experts is None else {"shared": self._shared(state)})
        counts = state["counts"]
        local = counts if self.ep_size == 1 else counts.both[1].to(torch.int32)  # [ranks, experts of this rank]
        rows, places, sizes, number = permute_by_local_expert(state["rows"], local)
        rows = unpermute_by_local_expert(self.experts(rows, sizes), places, number)
        return state | {"rows": rows} | ({} if self.shared_experts is None else {"shared": self._shared(state)})

    def _compute_weighted(self, state: State, deep_ep: DeepEP) -> State:
        """The same where weights travel too, and are applied before or after the experts."""
        state = dict(state)
        rows, sizes = deep_ep.arrange(state)
        if self.score_apply == "pre":
            weights = state["weights"].flatten()[state["place"]].unsqueeze(1)
            rows = (rows.float() * weights).to(rows.dtype)
            state["weights"] = torch.ones_like(state["weights"])
        return deep_ep.restore(state, self.experts(rows, sizes.device.to(torch.int32)))

    def combine(self, state: State, tickets: Tickets | None) -> State:
        """Send results back."""
        if self._deep_ep is not None:
            return self._deep_ep.combine(state, tickets)
        if self.ep_size == 1:
            return state
        counts: Counts = state.pop("counts")
        rows = exchange(state["rows"], counts.receive, counts.send, self.ep_group, tickets, self._stream)
        return state | {"rows": rows}

    def finish(self, state: State) -> Tensor | tuple[Tensor, Tensor | None]:
        """The weighted sum over the experts of each token, and over the shared ones: what the block returns."""
        if self._deep_ep is not None:
            out = self._deep_ep.finish(state).reshape(state["shape"])
        else:
            out = combine_from_routed(
                state["rows"],
                top_scores=state["scores"],
                token_indices_sorted=state["order"],
                top_k=self.top_k,
                score_apply=self.score_apply,
                combine_impl=self.combine_impl,
                shape=state["shape"],
            )
        if self.moe_output_shape == "flat":
            out = out.reshape(-1, out.shape[-1])
        if "shared" in state:
            out = out + state["shared"].reshape_as(out)
        return (out, self._logits(state["hidden"])) if self.return_router_logits else out

    def _shared(self, state: State) -> Tensor:
        hidden: Tensor = state["hidden"]
        flat = self.moe_output_shape == "flat" or self.shared_experts_gate is not None
        x = hidden.reshape(-1, hidden.shape[-1]) if flat else hidden
        out: Tensor = self.shared_experts(x)
        return out if self.shared_experts_gate is None else torch.sigmoid(self.shared_experts_gate(x)) * out

    def _logits(self, hidden: Tensor) -> Tensor | None:
        """What recorders of a whole model ask of a block."""
        if self.router_logits_capture_target != "router":
            return None
        logits: Tensor = self.router.gate(hidden.reshape(-1, hidden.shape[-1]))
        if self.router_logits_capture_mode != "post_score":
            return logits
        scores = logits.float().softmax(dim=-1) if self.router.score_func == "softmax" else logits.float().sigmoid()
        return scores.to(logits.dtype)
