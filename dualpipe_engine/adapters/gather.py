"""The whole model's weights from the stages of an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ..comm.from_all import from_all
from ..engine.placing.experts import whole_experts
from .stage import Stage

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine


def named_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Weights and persistent buffers of the adapter stages within `module`, by their names in the whole model."""
    found: dict[str, torch.Tensor] = {}
    for part in module.modules():
        if isinstance(part, Stage):
            found |= part.state_dict()
    return found


def gather_state_dict(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """The state dict of the whole model, from the layers that `to_layer_specs` made. Collective over all ranks.

    Args:
        engine: what `dualpipe_engine.initialize` returned.

    Returns:
        On rank 0 name -> CPU tensor, for `save_pretrained(..., state_dict=...)`; empty on the others.
    """
    with whole_experts(engine.module, keep=True):
        mine = {name: tensor.detach().to("cpu", copy=True) for name, tensor in named_weights(engine.module).items()}
    return gather_named(mine)


def gather_named(mine: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What ranks have under names of the whole model, each name once. Collective over all ranks.

    Args:
        mine: name -> CPU tensor of this rank.

    Returns:
        On rank 0 that of all ranks; empty on the others.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    names_of_ranks = from_all(sorted(mine))
    whole: dict[str, torch.Tensor] = {}
    owner = {name: source for source in reversed(range(world)) for name in names_of_ranks[source]}
    for source in range(world):
        names = sorted(name for name, first in owner.items() if first == source)
        if source == rank and rank != 0 and names:
            dist.send_object_list([{name: mine[name] for name in names}], dst=0)
        elif rank == 0 and names:
            box: list[Any] = [None]
            if source == 0:
                box = [mine]
            else:
                dist.recv_object_list(box, src=source)
            whole |= {name: box[0][name] for name in names}
    return whole
