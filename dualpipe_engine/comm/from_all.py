"""What every rank of a group has to say, for all of them."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


def from_all(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Give `value`, of any kind that pickle knows, to all ranks of a group.

    Collective over the group.

    Args:
        value: of this rank.
        group: the ranks; None: the world.

    Returns:
        The value of each rank, by its rank in the group.
    """
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
