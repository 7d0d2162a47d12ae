"""Transformer blocks: the dense one, which offers phases where ranks share sequences, and the one with experts, which
always does.

States between blocks are `[batch, length, hidden]`, or with more than that tuples, see `Passed`. The sum of the
auxiliary losses so far travels down the pipeline with the activations, so that its gradient travels up with theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from ..comm.all_to_all import exchange
from ..comm.nest import Nest
from ..comm.tickets import Tickets
from ..errors import ConfigError
from ..runtime.phases import COMM, COMPUTE, Phase
from .attention import Attention, GroupedQueryAttention, LatentAttention
from .config import MoEConfig
from .deep_ep import DeepEP, deep_ep_available
from .dispatch import AllToAll, Dispatcher, State
from .experts import Experts, FeedForward
from .routing import Counted, Router


def _attention(config: MoEConfig) -> Attention:
    return LatentAttention(config) if config.attention == "latent" else GroupedQueryAttention(config)


def _passed_by(phase: Phase) -> Phase:
    """The phase on the first of two, which the second passes by."""
    return phase._replace(run=partial(_on_first, phase.run))


def _on_first(run: Callable[..., Nest], state: tuple[Nest, Nest], *tickets: Tickets | None) -> tuple[Nest, Nest]:
    first, second = state
    return run(first, *tickets), second


class Passed(NamedTuple):
    """What passes from layer to layer.

    Args:
        x: [batch, length, hidden], the stream that the next block works on; after the head logits.
        loss: [1], the sum of auxiliary losses; None: there is none.
        tokens: [batch, length] int64, where embeddings of later tokens will be needed; of a part of sequences with
            those ahead of it.
        ahead: those embeddings, `[batch, length - k, hidden]` for each depth k of multi-token prediction to come.
        done: [batch, length - k, hidden] for k from 0, finished streams of lower depths, which only the head works on;
            after it logits of higher depths.
    """

    x: Tensor
    loss: Tensor | None = None
    tokens: Tensor | None = None
    ahead: tuple[Tensor, ...] = ()
    done: tuple[Tensor, ...] = ()


def split(state: Nest) -> Passed:
    """A state between layers by its parts."""
    return Passed(*state) if isinstance(state, tuple) else Passed(state)


def joined(passed: Passed) -> Nest:
    """The inverse of `split`."""
    if passed.tokens is not None or passed.ahead or passed.done:
        return tuple(passed)
    return passed.x if passed.loss is None else (passed.x, passed.loss)


def initialise(layer: nn.Module, config: MoEConfig) -> None:
    """Draw the matrices of a new layer as `init_std` says, if it does."""
    if config.init_std is None:
        return
    for part in layer.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=config.init_std)


#: What DeepSeek-V3 computes again in the backward: norms, activation functions, and what the up-projections of latent
#: attention make (arXiv 2412.19437, section 3.2.3).
RECOMPUTED = ("norm", "activation", r"attention\.(expand|turn|query\.[12])")


class DenseBlock(nn.Module):
    """A pre-norm block without experts.

    Attributes:
        recomputed: names of modules that `"recompute": true` stands for.
        phases: offered once ranks share sequences.
    """

    recomputed = RECOMPUTED
    phases: Callable[[], list[Phase]]

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(config.hidden, config.norm_eps) for _ in range(2))
        self.attention = _attention(config)
        self.mlp = FeedForward(config.hidden, config.dense_inner)
        initialise(self, config)

    def share_sequences(self, group: dist.ProcessGroup) -> None:
        """Offer phases, because the attention, which is given the same `group`, will have some."""
        self.phases = self._steps

    def _steps(self) -> list[Phase]:
        """Norm, the attention's, feed-forward."""
        return [
            Phase("norm", COMPUTE, self._enter),
            *map(_passed_by, self.attention.steps()),
            Phase("feed-forward", COMPUTE, self._finish),
        ]

    def forward(self, state: Nest) -> Nest:
        normed, passed = self._enter(state)
        return self._finish((self.attention(normed), passed))

    def _enter(self, state: Nest) -> tuple[Tensor, Passed]:
        passed = split(state)
        return self.norm1(passed.x), passed

    def _finish(self, state: tuple[Tensor, Passed]) -> Nest:
        mixed, passed = state
        x = passed.x + mixed
        return joined(passed._replace(x=x + self.mlp(self.norm2(x))))


class MoEBlock(nn.Module):
    """A pre-norm block with routed and shared experts.

    Args:
        config: sizes.
        rank: of the ranks that share the experts, the number of this one.

    Attributes:
        recomputed: names of modules that `"recompute": true` stands for.
    """

    recomputed = RECOMPUTED

    def __init__(self, config: MoEConfig, rank: int = 0) -> None:
        super().__init__()
        self.config = config
        self.norm1, self.norm2 = (nn.RMSNorm(config.hidden, config.norm_eps) for _ in range(2))
        self.attention = _attention(config)
        self.router = Router(config)
        self.experts = Experts(config, rank)
        self.shared = (
            FeedForward(config.hidden, config.shared_experts * config.expert_inner) if config.shared_experts else None
        )
        self.dispatcher: Dispatcher = AllToAll(None, config.experts)
        self.ep_size = config.expert_parallel
        self._sharing: dist.ProcessGroup | None = None  # the ranks that share sequences
        initialise(self, config)

    def share_sequences(self, group: dist.ProcessGroup) -> None:
        """Take the auxiliary loss of whole sequences, of which each rank of `group` has a part."""
        self._sharing = group

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
        """The block as phases: those of the attention, routing, counts of rows, dispatch, experts, combine, sum."""
        return [
            Phase("norm", COMPUTE, self._enter),
            *map(_passed_by, self.attention.steps()),
            Phase("routing", COMPUTE, self._route),
            Phase("counts", COMM, self._count),
            Phase("dispatch", COMM, self._dispatch),
            Phase("experts", COMPUTE, self._compute),
            Phase("combine", COMM, self._combine),
            Phase("sum", COMPUTE, self._finish),
        ]

    def forward(self, state: Nest) -> Nest:
        normed, passed = self._enter(state)
        state = self._route((self.attention(normed), passed))
        state = self._dispatch(self._count(state, None), None)
        return self._finish(self._combine(self._compute(state), None))

    def _enter(self, state: Nest) -> tuple[Tensor, Passed]:
        passed = split(state)
        return self.norm1(passed.x), passed

    def _route(self, state: tuple[Tensor, Passed]) -> State:
        mixed, passed = state
        x = passed.x + mixed
        normed = self.norm2(x)
        routing = self.router(normed.flatten(0, 1), len(normed), self._counted(passed, normed.shape[1]))
        ready = self.dispatcher.prepare(normed.flatten(0, 1), routing) | {"residual": x}
        if self.shared is not None:
            ready["normed"] = normed
        if routing.balance is not None:
            ready["balance"] = routing.balance
        return ready | {"passed": passed[1:]}

    def _counted(self, passed: Passed, length: int) -> Counted | None:
        """Which of `length` tokens of each sequence count; None: all."""
        return None

    def _count(self, state: State, tickets: Tickets | None) -> State:
        if self._sharing is not None and "balance" in state:
            loads, ranks = state["balance"].loads, self._sharing.size()
            parts = exchange(loads.expand(ranks, *loads.shape), [1] * ranks, [1] * ranks, self._sharing, tickets)
            state = state | {"balance": state["balance"]._replace(loads=parts)}
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
        passed = Passed(residual + self.dispatcher.finish(state).view_as(residual), *state["passed"])
        if "balance" in state:
            assert passed.loss is not None
            passed = passed._replace(loss=passed.loss + state["balance"].loss().to(passed.loss.dtype))
        return joined(passed)
