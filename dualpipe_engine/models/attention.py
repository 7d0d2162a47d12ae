"""Causal self-attention with rotary positions: grouped-query, and the multi-head latent attention of DeepSeek-V3."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..runtime.phases import COMM, COMPUTE, Phase
from .config import MoEConfig
from .head_exchange import HeadExchange, Parcel
from .positions import Rotary

#: Of the norms within latent attention, in all published models of DeepSeek, whatever that of the other norms is.
LATENT_EPS = 1e-6


def _softmax_scale(config: MoEConfig, width: int) -> float | None:
    """Of products of queries and keys of that width; None: torch's default."""
    return None if config.yarn is None else config.yarn.softmax_scale(width)


class Attention(nn.Module, ABC):
    """What both kinds have in common, on `[batch, length, hidden]`: tokens are projected, mixed, and projected back.
    Ranks that share sequences exchange them for heads in between, see `HeadExchange`.

    Attributes:
        heads: of queries.
        kv_heads: of keys and values.
        phases: offered once ranks share sequences.
    """

    heads: int
    kv_heads: int
    phases: Callable[[], list[Phase]]

    def __init__(self) -> None:
        super().__init__()
        self._shared: HeadExchange | None = None

    def share_sequences(self, group: dist.ProcessGroup) -> None:
        """Attend to sequences of which each rank of `group` has a part of equal length.

        Raises:
            ConfigError: the heads cannot be divided among them.
        """
        shared = HeadExchange(group)
        shared.check(self.heads, self.kv_heads)
        self._shared, self.phases = shared, self.steps

    def steps(self) -> list[Phase]:
        """The whole as phases, of which one only is there where no sequences are shared."""
        if self._shared is None:
            return [Phase("attention", COMPUTE, self._alone)]
        return [
            Phase("project", COMPUTE, partial(self._projected, self._shared)),
            Phase("heads", COMM, self._shared.travel),
            Phase("attention", COMPUTE, partial(self._mixed, self._shared)),
            Phase("tokens", COMM, self._shared.travel),
            Phase("output", COMPUTE, partial(self._returned, self._shared)),
        ]

    def forward(self, x: Tensor) -> Tensor:
        if self._shared is None:
            return self._alone(x)
        parcel = self._shared.travel(self._projected(self._shared, x), None)
        return self._returned(self._shared, self._shared.travel(self._mixed(self._shared, parcel), None))

    def _alone(self, x: Tensor) -> Tensor:
        return self._output(self._mix(*self._project(x)))

    def _projected(self, shared: HeadExchange, x: Tensor) -> Parcel:
        return shared.by_heads(*self._project(x))

    def _mixed(self, shared: HeadExchange, parcel: Parcel) -> Parcel:
        return shared.by_tokens(self._mix(*shared.heads_of(parcel)))

    def _returned(self, shared: HeadExchange, parcel: Parcel) -> Tensor:
        return self._output(shared.tokens_of(parcel))

    @abstractmethod
    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What tokens are mixed by, of `x [batch, length, hidden]`: `[batch, length, heads, width]` each."""

    @abstractmethod
    def _mix(self, first: Tensor, second: Tensor, third: Tensor, /) -> Tensor:
        """The mixed tokens, `[batch, length, heads, width]`, of what `_project` makes, or of some heads of it."""

    @abstractmethod
    def _output(self, mixed: Tensor) -> Tensor:
        """`[batch, length, hidden]` of what `_mix` makes of all heads."""


class GroupedQueryAttention(Attention):
    """Attention whose heads share keys and values in groups (arXiv 2305.13245)."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head, self.scale = config.head, _softmax_scale(config, config.head)
        self.rotary = Rotary(config.theta, config.interleaved, config.yarn)
        self.query = nn.Linear(config.hidden, self.heads * self.head, bias=False)
        self.key = nn.Linear(config.hidden, self.kv_heads * self.head, bias=False)
        self.value = nn.Linear(config.hidden, self.kv_heads * self.head, bias=False)
        self.out = nn.Linear(self.heads * self.head, config.hidden, bias=False)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query = self.query(x).unflatten(-1, (self.heads, self.head))
        key = self.key(x).unflatten(-1, (self.kv_heads, self.head))
        return query, key, self.value(x).unflatten(-1, (self.kv_heads, self.head))

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, /) -> Tensor:
        query, key, value = self.rotary(query.transpose(1, 2)), self.rotary(key.transpose(1, 2)), value.transpose(1, 2)
        grouped = self.kv_heads != self.heads
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale, enable_gqa=grouped)
        return mixed.transpose(1, 2)

    def _output(self, mixed: Tensor) -> Tensor:
        out: Tensor = self.out(mixed.flatten(2))
        return out


class Turned(nn.Module):
    """Queries or keys of heads from a part without position and one with, which heads may share.

    Args:
        rotary: turns the latter.
    """

    def __init__(self, rotary: Rotary) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, plain: Tensor, position: Tensor) -> Tensor:
        """Put the parts together.

        Args:
            plain: [batch, heads, length, width].
            position: [batch, heads or 1, length, rotary width].
        """
        return torch.cat([plain, self.rotary(position).expand(-1, plain.shape[1], -1, -1)], dim=-1)


class LatentAttention(Attention):
    """Attention with keys and values compressed together, and one rotary key for all heads (DeepSeek-V3 report, section
    2.1.1). Heads are exchanged behind the up-projections."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.heads = self.kv_heads = config.heads
        self.head, self.kv_rank, self.turned = config.head, config.kv_rank, config.rotary
        self.value_head = config.head if config.value_head is None else config.value_head
        self.turn = Turned(Rotary(config.theta, config.interleaved, config.yarn))
        self.scale = _softmax_scale(config, self.head + self.turned)
        eps = None if config.norm_eps is None else LATENT_EPS
        queries = self.heads * (self.head + self.turned)
        self.query: nn.Module = nn.Linear(config.hidden, queries, bias=False)
        if config.q_rank is not None:
            down = nn.Linear(config.hidden, config.q_rank, bias=False)
            norm = nn.RMSNorm(config.q_rank, eps)
            self.query = nn.Sequential(down, norm, nn.Linear(config.q_rank, queries, bias=False))
        self.compress = nn.Linear(config.hidden, self.kv_rank + self.turned, bias=False)
        self.norm = nn.RMSNorm(self.kv_rank, eps)
        self.expand = nn.Linear(self.kv_rank, self.heads * (self.head + self.value_head), bias=False)
        self.out = nn.Linear(self.heads * self.value_head, config.hidden, bias=False)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query = self.query(x).unflatten(-1, (self.heads, -1))
        latent, position = self.compress(x).split([self.kv_rank, self.turned], dim=-1)
        return query, self.expand(self.norm(latent)).unflatten(-1, (self.heads, -1)), position.unsqueeze(2)

    def _mix(self, query: Tensor, expanded: Tensor, position: Tensor, /) -> Tensor:
        query, expanded, position = query.transpose(1, 2), expanded.transpose(1, 2), position.transpose(1, 2)
        query = self.turn(query[..., : self.head], query[..., self.head :])
        key = self.turn(expanded[..., : self.head], position)
        value = expanded[..., self.head :]
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)
        return mixed.transpose(1, 2)

    def _output(self, mixed: Tensor) -> Tensor:
        out: Tensor = self.out(mixed.flatten(2))
        return out
