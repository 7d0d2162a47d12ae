"""Causal self-attention with rotary positions: grouped-query, and the multi-head latent attention of DeepSeek-V3."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .config import MoEConfig
from .head_exchange import HeadExchange
from .positions import Rotary

#: Of the norms within latent attention, in all published models of DeepSeek, whatever that of the other norms is.
LATENT_EPS = 1e-6


def _softmax_scale(config: MoEConfig, width: int) -> float | None:
    """Of products of queries and keys of that width; None: torch's default."""
    return None if config.yarn is None else config.yarn.softmax_scale(width)


class GroupedQueryAttention(nn.Module):
    """Attention whose heads share keys and values in groups (arXiv 2305.13245), on `[batch, length, hidden]`."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self._shared: HeadExchange | None = None
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head, self.scale = config.head, _softmax_scale(config, config.head)
        self.rotary = Rotary(config.theta, config.interleaved, config.yarn)
        self.query = nn.Linear(config.hidden, self.heads * self.head, bias=False)
        self.key = nn.Linear(config.hidden, self.kv_heads * self.head, bias=False)
        self.value = nn.Linear(config.hidden, self.kv_heads * self.head, bias=False)
        self.out = nn.Linear(self.heads * self.head, config.hidden, bias=False)

    def share_sequences(self, group: dist.ProcessGroup) -> None:
        """Attend to sequences of which each rank of `group` has a part of equal length.

        Raises:
            ConfigError: the heads cannot be divided among them.
        """
        shared = HeadExchange(group)
        shared.check(self.heads, self.kv_heads)
        self._shared = shared

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query = self.query(x).view(batch, length, self.heads, self.head)
        key = self.key(x).view(batch, length, self.kv_heads, self.head)
        value = self.value(x).view(batch, length, self.kv_heads, self.head)
        if self._shared is not None:
            query, key, value = self._shared.to_heads(query, key, value)
        query, key, value = self.rotary(query.transpose(1, 2)), self.rotary(key.transpose(1, 2)), value.transpose(1, 2)
        grouped = self.kv_heads != self.heads
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale, enable_gqa=grouped)
        mixed = mixed.transpose(1, 2)
        if self._shared is not None:
            mixed = self._shared.to_tokens(mixed)
        out: Tensor = self.out(mixed.reshape(batch, length, self.heads * self.head))
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


class LatentAttention(nn.Module):
    """Attention with keys and values compressed together, and one rotary key for all heads, on
    `[batch, length, hidden]` (DeepSeek-V3 report, section 2.1.1)."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self._shared: HeadExchange | None = None
        self.heads, self.head, self.kv_rank, self.turned = config.heads, config.head, config.kv_rank, config.rotary
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

    def share_sequences(self, group: dist.ProcessGroup) -> None:
        """Attend to sequences of which each rank of `group` has a part of equal length. Heads are exchanged behind the
        up-projections.

        Raises:
            ConfigError: the heads cannot be divided among them.
        """
        shared = HeadExchange(group)
        shared.check(self.heads, self.heads)
        self._shared = shared

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query = self.query(x).view(batch, length, self.heads, -1)
        latent, position = self.compress(x).split([self.kv_rank, self.turned], dim=-1)
        expanded = self.expand(self.norm(latent)).view(batch, length, self.heads, -1)
        position = position.unsqueeze(2)
        if self._shared is not None:
            query, expanded, position = self._shared.to_heads(query, expanded, position)
        query, expanded, position = query.transpose(1, 2), expanded.transpose(1, 2), position.transpose(1, 2)
        query = self.turn(query[..., : self.head], query[..., self.head :])
        key = self.turn(expanded[..., : self.head], position)
        value = expanded[..., self.head :]
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale).transpose(1, 2)
        if self._shared is not None:
            mixed = self._shared.to_tokens(mixed)
        out: Tensor = self.out(mixed.reshape(batch, length, self.heads * self.value_head))
        return out
