"""Ulysses: ranks that share sequences exchange parts of them for heads, and back (arXiv 2309.14509).

Outside of attention a rank has all heads of `length / S` neighbouring tokens, within it `heads / S` heads of all.
Packing, which is computation, and the all-to-all are apart, so that they can be phases:

    by_heads (compute) -> travel (comm) -> heads_of (compute) -> attention -> by_tokens (compute) -> travel (comm)
    -> tokens_of (compute)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm.all_to_all import exchange
from ..comm.stream import SharedStream, shared_stream
from ..comm.tickets import Tickets
from ..errors import ConfigError


class Parcel(NamedTuple):
    """What travels in one all-to-all.

    Args:
        rows: [S, batch, length / S, sum of heads / S * width]; block i goes to, or has come from, group rank i.
        sizes: of each tensor in it, (heads / S, width).
    """

    rows: Tensor
    sizes: tuple[tuple[int, int], ...]


class HeadExchange:
    """The two all-to-alls around attention. Differentiable; collective over the ranks of `group`.

    Args:
        group: the S ranks that share each sequence, in the order of its parts.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._ranks = group.size()
        self._stream: SharedStream | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> HeadExchange:
        """A copy of a module is of the same ranks."""
        return self

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

    def by_heads(self, *parts: Tensor) -> Parcel:
        """Pack queries, keys and values for the ranks of their heads.

        Args:
            parts: [batch, length / S, heads, width] each. Heads fewer than S are repeated, so that each rank has
                the one that its queries ask for.
        """
        ranks, (batch, length) = self._ranks, parts[0].shape[:2]
        whole = [part.repeat_interleave(max(1, ranks // part.shape[2]), dim=2) for part in parts]
        blocks = [part.reshape(batch, length, ranks, -1) for part in whole]
        rows = torch.cat(blocks, dim=-1).permute(2, 0, 1, 3).contiguous()
        return Parcel(rows, tuple((part.shape[2] // ranks, part.shape[3]) for part in whole))

    def travel(self, parcel: Parcel, tickets: Tickets | None) -> Parcel:
        """Exchange the blocks.

        Args:
            parcel: of `by_heads` or `by_tokens`.
            tickets: takes the ticket, see `comm.all_to_all.exchange`. None: wait here.
        """
        if self._stream is None:
            self._stream = shared_stream(parcel.rows.device)
        each = [1] * self._ranks
        return parcel._replace(rows=exchange(parcel.rows, each, each, self._group, tickets, self._stream))

    def heads_of(self, parcel: Parcel) -> list[Tensor]:
        """What has come of `by_heads`: [batch, length, heads / S, width] each."""
        ranks, batch, length, _ = parcel.rows.shape
        split = parcel.rows.split([heads * width for heads, width in parcel.sizes], dim=-1)
        # Each in memory of its own: what keeps one for the backward would keep the others too.
        return [
            rows.transpose(0, 1).contiguous().view(batch, ranks * length, *size)
            for rows, size in zip(split, parcel.sizes, strict=True)
        ]

    def by_tokens(self, mixed: Tensor) -> Parcel:
        """Pack the results of attention for the ranks of their tokens.

        Args:
            mixed: [batch, length, heads / S, width].
        """
        ranks, (batch, length, heads, width) = self._ranks, mixed.shape
        rows = mixed.reshape(batch, ranks, length // ranks, heads * width).transpose(0, 1).contiguous()
        return Parcel(rows, ((heads, width),))

    def tokens_of(self, parcel: Parcel) -> Tensor:
        """What has come of `by_tokens`: [batch, length / S, heads, width]."""
        ranks, batch, length, _ = parcel.rows.shape
        ((heads, width),) = parcel.sizes
        return parcel.rows.permute(1, 2, 0, 3).reshape(batch, length, ranks * heads, width)
