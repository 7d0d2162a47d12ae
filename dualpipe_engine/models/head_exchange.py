"""Ulysses: ranks that share sequences exchange parts of them for heads, and back (arXiv 2309.14509).

Outside of attention a rank has all heads of `length / S` neighbouring tokens, within it `heads / S` heads of all:

    to_heads:   [batch, length / S, heads, width]  ->  [batch, length, heads / S, width]
    to_tokens:  the inverse
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm.all_to_all import exchange
from ..errors import ConfigError


class HeadExchange:
    """The two all-to-alls around attention. Differentiable; collective over the ranks of `group`.

    Args:
        group: the S ranks that share each sequence, in the order of its parts.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._ranks = group.size()

    def check(self, heads: int, kv_heads: int) -> None:
        """Refuse heads that cannot be divided.

        Args:
            heads: of queries.
            kv_heads: of keys and values; fewer than ranks are repeated.

        Raises:
            ConfigError: one rank would have more than another.
        """
        if heads % self._ranks:
            raise ConfigError(
                f'{heads} attention heads cannot be divided among "sequence_parallel_size": {self._ranks}: take a '
                "divisor of the heads"
            )
        if kv_heads % self._ranks and self._ranks % kv_heads:
            raise ConfigError(
                f'{kv_heads} heads of keys and values do not fit "sequence_parallel_size": {self._ranks}: take a '
                "divisor or a multiple of them"
            )

    def to_heads(self, *parts: Tensor) -> list[Tensor]:
        """Queries, keys and values in one exchange.

        Args:
            parts: [batch, length / S, heads, width] each. Heads fewer than S are repeated, so that each rank has
                the one that its queries ask for.

        Returns:
            [batch, length, heads / S, width] each.
        """
        ranks, (batch, length) = self._ranks, parts[0].shape[:2]
        whole = [part.repeat_interleave(max(1, ranks // part.shape[2]), dim=2) for part in parts]
        blocks = [part.reshape(batch, length, ranks, -1) for part in whole]
        rows = torch.cat(blocks, dim=-1).permute(2, 0, 1, 3)
        received = self._exchange(rows).permute(1, 0, 2, 3).reshape(batch, ranks * length, -1)
        split = received.split([block.shape[-1] for block in blocks], dim=-1)
        return [
            mine.reshape(batch, ranks * length, part.shape[2] // ranks, part.shape[3])
            for mine, part in zip(split, whole, strict=True)
        ]

    def to_tokens(self, mixed: Tensor) -> Tensor:
        """The results of attention back to the ranks of their tokens.

        Args:
            mixed: [batch, length, heads / S, width].

        Returns:
            [batch, length / S, heads, width].
        """
        ranks, (batch, length, heads, width) = self._ranks, mixed.shape
        rows = mixed.reshape(batch, ranks, length // ranks, heads * width).permute(1, 0, 2, 3)
        return self._exchange(rows).permute(1, 2, 0, 3).reshape(batch, length // ranks, ranks * heads, width)

    def _exchange(self, rows: Tensor) -> Tensor:
        each = [1] * self._ranks
        return exchange(rows.contiguous(), each, each, self._group)
