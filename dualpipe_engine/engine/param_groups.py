"""GroupMap: the user's choice of parameters, carried over to the stages that a rank holds after `place`.

A user builds parameter groups, or an optimizer, over the parameters that the PipelineModule held when it was built.
Groups are remembered by parameter name on the rank that had the parameter, and applied by name wherever it is now.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipelineParallelGrid

from ..errors import ConfigError
from .module import PLACEHOLDER


class GroupMap:
    """Made before `place`, asked after it. The constructor is collective over the ranks of a pipeline.

    Args:
        model: the module, not yet placed.
        parameters: `model_parameters` of initialize: None, parameters, or dicts of groups.
        optimizer: `optimizer` of initialize: None, a callable, or an optimizer over the module's parameters.
        grid: the module's grid.

    Raises:
        ConfigError: a parameter does not belong to the module, or the optimizer has state already.
    """

    def __init__(
        self, model: PipelineModule, parameters: Iterable[Any] | None, optimizer: Any, grid: PipelineParallelGrid
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._groups: list[dict[str, Any]] | None = None
        self._flat = False
        if isinstance(optimizer, torch.optim.Optimizer):
            if optimizer.state:
                raise ConfigError("the optimizer has taken steps already: pass a fresh one to initialize")
            self._groups = optimizer.param_groups
        elif parameters is not None:
            given = list(parameters)
            self._flat = not any(isinstance(group, dict) for group in given)
            self._groups = [{"params": given}] if self._flat else given
        self._number: dict[str, int] = {}
        if self._groups is not None:
            self._collect(grid)

    def _collect(self, grid: PipelineParallelGrid) -> None:
        assert self._groups is not None
        names = {id(param): name for name, param in self._model.named_parameters()}
        mine = {}
        for number, group in enumerate(self._groups):
            params = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
            for param in params:
                if id(param) not in names:
                    raise ConfigError("a parameter given to initialize does not belong to the PipelineModule")
                mine[names[id(param)]] = number
        found: list[dict[str, int]] = [{} for _ in grid.pp_group]
        dist.all_gather_object(found, mine, group=grid.pp_proc_group)
        for numbers in found:
            self._number |= numbers

    def _placed(self) -> list[list[torch.nn.Parameter]]:
        assert self._groups is not None
        params: list[list[torch.nn.Parameter]] = [[] for _ in self._groups]
        for name, param in self._model.named_parameters():
            if name in self._number:
                params[self._number[name]].append(param)
        if hasattr(self._model, PLACEHOLDER):
            params[0].append(getattr(self._model, PLACEHOLDER))
        return params

    def parameters(self) -> list[Any] | None:
        """What to give DeepSpeed as `model_parameters`."""
        if self._groups is None or isinstance(self._optimizer, torch.optim.Optimizer):
            return None
        placed = self._placed()
        if self._flat:
            return list(placed[0])
        return [group | {"params": params} for group, params in zip(self._groups, placed, strict=True)]

    def optimizer(self) -> Any:
        """What to give DeepSpeed as `optimizer`: the user's own, over the parameters of this rank."""
        if isinstance(self._optimizer, torch.optim.Optimizer):
            for group, params in zip(self._optimizer.param_groups, self._placed(), strict=True):
                group["params"] = params
        return self._optimizer
