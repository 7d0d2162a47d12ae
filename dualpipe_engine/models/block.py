"""Transformer blocks: the dense one, and the one with experts, which offers phases.

States between blocks are `[batch, length, hidden]`; where there is an auxiliary loss, pairs of that and the sum of the
losses so far (`[1]`), which travels down the pipeline with the activations, so that its gradient travels up with
theirs.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from ..comm.nest import Nest
from ..comm.tickets import Tickets
from ..errors import ConfigError
from ..runtime.phases import COMM, COMPUTE, Phase
from .attention import GroupedQueryAttention, LatentAttention
from .config import MoEConfig
from .deep_ep import DeepEP, deep_ep_available
from .dispatch import AllToAll, Dispatcher, State
from .experts import Experts, FeedForward
from .routing import Router


def _attention(config: MoEConfig) -> nn.Module:
    return LatentAttention(config) if config.attention == "latent" else GroupedQueryAttention(config)


def split(state: Nest) -> tuple[Tensor, Tensor | None]:
    """A state between blocks as (hidden, auxiliary loss or None)."""
    return state if isinstance(state, tuple) else (state, None)


def joined(x: Tensor, loss: Tensor | None) -> Nest:
    """The inverse of `split`."""
    return x if loss is None else (x, loss)


class DenseBlock(nn.Module):
    """A pre-norm block without experts."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(config.hidden), nn.RMSNorm(config.hidden)
        self.attention = _attention(config)
        self.mlp = FeedForward(config.hidden, config.dense_inner)

    def forward(self, state: Nest) -> Nest:
        x, loss = split(state)
        x = x + self.attention(self.norm1(x))
        return joined(x + self.mlp(self.norm2(x)), loss)


class MoEBlock(nn.Module):
    """A pre-norm block with routed and shared experts.

    Args:
        config: sizes.
        rank: of the ranks that share the experts, the number of this one.
    """

    def __init__(self, config: MoEConfig, rank: int = 0) -> None:
        super().__init__()
        self.config = config
        self.norm1, self.norm2 = nn.RMSNorm(config.hidden), nn.RMSNorm(config.hidden)
        self.attention = _attention(config)
        self.router = Router(config)
        self.experts = Experts(config, rank)
        self.shared = (
            FeedForward(config.hidden, config.shared_experts * config.expert_inner) if config.shared_experts else None
        )
        self.dispatcher: Dispatcher = AllToAll(None, config.experts)
        self.ep_size = config.expert_parallel

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by DeepSpeed's engines when process groups can be had; ours has made them.

        Raises:
            ConfigError: the engine is DeepSpeed's own, which would reduce experts like any other weights.
        """
        from deepspeed.utils import groups

        if self.ep_size == 1:
            return
        name = self.experts.expert_group_name
        if name not in groups._get_expert_parallel_group_dict():
            raise ConfigError(
                f"experts shared by {self.ep_size} ranks do not train in DeepSpeed's own engine: start by "
                'dualpipe_engine.initialize with a "schedule" in the "pipeline" section ("1f1b" is DeepSpeed\'s '
                "order), or set expert_parallel to 1"
            )
        self.connect(groups._get_expert_parallel_group(name))

    def connect(self, group: dist.ProcessGroup) -> None:
        """Share the experts with the ranks of `group`; see `Experts.connect`."""
        self.experts.connect(group)
        experts = self.config.experts
        self.dispatcher = DeepEP(group, experts) if deep_ep_available(group) else AllToAll(group, experts)

    def phases(self) -> list[Phase]:
        """The block as phases: attention and routing, counts of rows, dispatch, experts, combine, sum."""
        return [
            Phase("attention", COMPUTE, self._attend),
            Phase("counts", COMM, self._count),
            Phase("dispatch", COMM, self._dispatch),
            Phase("experts", COMPUTE, self._compute),
            Phase("combine", COMM, self._combine),
            Phase("sum", COMPUTE, self._finish),
        ]

    def forward(self, state: Nest) -> Nest:
        state = self._dispatch(self._count(self._attend(state), None), None)
        return self._finish(self._combine(self._compute(state), None))

    def _attend(self, state: Nest) -> State:
        x, loss = split(state)
        x = x + self.attention(self.norm1(x))
        normed = self.norm2(x)
        routing = self.router(normed.flatten(0, 1))
        ready = self.dispatcher.prepare(normed.flatten(0, 1), routing) | {"residual": x}
        if self.shared is not None:
            ready["normed"] = normed
        return ready if loss is None else ready | {"loss": loss + routing.loss.to(loss.dtype)}

    def _count(self, state: State, tickets: Tickets | None) -> State:
        return self.dispatcher.count(state, tickets)

    def _dispatch(self, state: State, tickets: Tickets | None) -> State:
        return self.dispatcher.dispatch(state, tickets)

    def _compute(self, state: State) -> State:
        state = dict(state)
        rows, sizes = self.dispatcher.arrange(state)
        residual = state.pop("residual")
        if self.shared is not None:
            residual = residual + self.shared(state.pop("normed"))
        return self.dispatcher.restore(state, self.experts(rows, sizes)) | {"residual": residual}

    def _combine(self, state: State, tickets: Tickets | None) -> State:
        return self.dispatcher.combine(state, tickets)

    def _finish(self, state: State) -> Nest:
        residual = state["residual"]
        return joined(residual + self.dispatcher.finish(state).view_as(residual), state.get("loss"))
