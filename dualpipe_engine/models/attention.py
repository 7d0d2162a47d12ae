"""Causal self-attention with rotary positions: grouped-query, and the multi-head latent attention of DeepSeek-V3."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .config import MoEConfig


def rotate(x: Tensor, theta: float) -> Tensor:
    """Turn the pairs (x_i, x_{i + width/2}) by angles that grow with the position (RoFormer, arXiv 2104.09864).

    Args:
        x: [batch, heads, length, width].
        theta: base of the frequencies.
    """
    half = x.shape[-1] // 2
    precise = torch.promote_types(x.dtype, torch.float32)
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=precise) / half)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=precise)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class GroupedQueryAttention(nn.Module):
    """Attention whose heads share keys and values in groups (arXiv 2305.13245), on `[batch, length, hidden]`."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head, self.theta = config.head, config.theta
        self.query = nn.Linear(config.hidden, self.heads * self.head, bias=False)
        self.key = nn.Linear(config.hidden, self.kv_heads * self.head, bias=False)
        self.value = nn.Linear(config.hidden, self.kv_heads * self.head, bias=False)
        self.out = nn.Linear(self.heads * self.head, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query = rotate(self.query(x).view(batch, length, self.heads, self.head).transpose(1, 2), self.theta)
        key = rotate(self.key(x).view(batch, length, self.kv_heads, self.head).transpose(1, 2), self.theta)
        value = self.value(x).view(batch, length, self.kv_heads, self.head).transpose(1, 2)
        grouped = self.kv_heads != self.heads
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, self.heads * self.head))
        return out


class LatentAttention(nn.Module):
    """Attention with keys and values compressed together, and one rotary key for all heads, on
    `[batch, length, hidden]` (DeepSeek-V3 report, section 2.1.1)."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.heads, self.head, self.rotary, self.theta = config.heads, config.head, config.rotary, config.theta
        self.kv_rank = config.kv_rank
        queries = self.heads * (self.head + self.rotary)
        self.query: nn.Module = nn.Linear(config.hidden, queries, bias=False)
        if config.q_rank is not None:
            down = nn.Linear(config.hidden, config.q_rank, bias=False)
            self.query = nn.Sequential(down, nn.RMSNorm(config.q_rank), nn.Linear(config.q_rank, queries, bias=False))
        self.compress = nn.Linear(config.hidden, self.kv_rank + self.rotary, bias=False)
        self.norm = nn.RMSNorm(self.kv_rank)
        self.expand = nn.Linear(self.kv_rank, self.heads * 2 * self.head, bias=False)
        self.out = nn.Linear(self.heads * self.head, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query = self.query(x).view(batch, length, self.heads, -1).transpose(1, 2)
        query = torch.cat([query[..., : self.head], rotate(query[..., self.head :], self.theta)], dim=-1)
        latent, position = self.compress(x).split([self.kv_rank, self.rotary], dim=-1)
        position = rotate(position.unsqueeze(1), self.theta).expand(-1, self.heads, -1, -1)
        expanded = self.expand(self.norm(latent)).view(batch, length, self.heads, 2 * self.head).transpose(1, 2)
        key = torch.cat([expanded[..., : self.head], position], dim=-1)
        mixed = scaled_dot_product_attention(query, key, expanded[..., self.head :], is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, self.heads * self.head))
        return out
