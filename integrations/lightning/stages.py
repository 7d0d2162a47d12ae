"""A chain of layers cut into stages, of which a rank keeps two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import nn

from dualpipe_engine.compat.deepseek import DualPipe, Nest
from dualpipe_engine.errors import ConfigError

LayerEntry: TypeAlias = Any
"""Of the list that a user gives: a module, or a LayerSpec of DeepSpeed."""


class SequentialStage(nn.Module):
    """Layers one after the other; several inputs reach the first layer as one tuple, as in a PipelineModule."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Nest) -> Nest:
        value = inputs[0] if len(inputs) == 1 else inputs
        for layer in self.children():
            value = layer(value)
        return value


class LocalStages(DualPipe):
    """The two stages of this rank.

    Args:
        layers: the whole model, the same on every rank; weights are taken from rank 0.
        device: where the stages run.
        num_stages: ranks of a pipeline, which follow each other; the pipelines are replicas.

    Attributes:
        replicas: the number of pipelines.

    Raises:
        ConfigError: there are fewer layers than stages.
        PlanError: the number of stages is odd.
    """

    def __init__(self, layers: dict[str, nn.Module], device: torch.device, num_stages: int) -> None:
        size, world = num_stages, dist.get_world_size()
        starts = range(0, world, size)
        groups = [dist.new_group(list(range(start, start + size))) for start in starts]
        replica, rank = divmod(dist.get_rank(), size)
        if len(layers) < size:
            raise ConfigError(f"{len(layers)} layers cannot fill {size} pipeline stages: use fewer devices")
        names = list(layers)
        bounds = [len(names) * stage // size for stage in range(size + 1)]
        held = []
        for stage in range(size):
            part = {name: layers[name] for name in names[bounds[stage] : bounds[stage + 1]]}
            for layer in part.values():
                layer.to(device)
                for tensor in (*layer.parameters(), *layer.buffers()):
                    dist.broadcast(tensor.detach(), 0)
                if stage not in (rank, size - 1 - rank):
                    layer.to("meta")  # gone from here; the names remain
            held.append(part)
        super().__init__(
            (SequentialStage(held[rank]), SequentialStage(held[size - 1 - rank])), process_group=groups[replica]
        )
        self._group, self.replicas = groups[replica], len(groups)

    def _make_twin_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same stages: in each replica two. All ranks make all groups, in one order."""
        size = self.num_ranks
        groups = [
            dist.new_group(
                sorted(at + near for at in range(0, dist.get_world_size(), size) for near in {r, size - 1 - r})
            )
            for r in range(size // 2)
        ]
        return groups[min(self.rank, size - 1 - self.rank)]

    @property
    def local_module(self) -> nn.ModuleList:
        """Both stages of this rank; their parameters are what the optimizer of this rank works on."""
        return self.module

    def whole_state_dict(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers of the whole model, on the CPU, named as in the model. Collective."""
        found: list[Any] = [None] * self.num_ranks
        mine = {name: tensor.detach().cpu() for name, tensor in self.module[0].state_dict().items()}
        dist.all_gather_object(found, mine, group=self._group)
        return {name: tensor for part in found for name, tensor in part.items()}

    def load_whole_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take the parameters and buffers of this rank's stages from those of the whole model.

        Raises:
            RuntimeError: one is missing or has another shape.
        """
        for stage in self.module:
            stage.load_state_dict({name: state[name] for name in stage.state_dict() if name in state})

    @torch.no_grad()
    def clip_gradients(self, limit: float) -> torch.Tensor:
        """Scale all gradients so that their norm over the whole model, each parameter once, is at most `limit`.

        Collective.

        Returns:
            The norm before (scalar).
        """
        grads: Sequence[torch.Tensor] = [p.grad for p in self.module.parameters() if p.grad is not None]
        once = [param.grad for param in self.module[0].parameters() if param.grad is not None]
        square = torch.stack([grad.double().pow(2).sum() for grad in once]).sum() if once else torch.zeros(1).double()
        square = square.reshape(()).to(grads[0].device)
        dist.all_reduce(square, group=self._group)
        norm = square.sqrt()
        factor = float((limit / (norm + 1e-6)).clamp(max=1.0))
        for grad in grads:
            grad.mul_(factor)
        return norm
