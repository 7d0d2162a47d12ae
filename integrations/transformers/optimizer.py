"""OptimizerView: what a Trainer may see of an optimizer that the engine steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from dualpipe_engine.errors import ConfigError

from ..optimizers import refuse_state

if TYPE_CHECKING:
    from dualpipe_engine.engine.engine import DualPipeEngine


class OptimizerView(torch.optim.Optimizer):
    """The parameter groups of the engine's optimizer, for learning rate schedulers, callbacks and logs.

    `step` and `zero_grad` do nothing: the engine has stepped already.

    Args:
        engine: the DualPipeEngine.
    """

    def __init__(self, engine: DualPipeEngine) -> None:
        self._engine = engine
        super().__init__([torch.zeros(1, requires_grad=True)], {})
        self.defaults = {key: value for key, value in self.param_groups[0].items() if key != "params"}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The engine's own dictionaries, also after a checkpoint was loaded: a scheduler writes what it uses."""
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        """Of the base class, which starts with none."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Of the base class; groups are those of the engine."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        pass

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"state": {}, "param_groups": []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def refuse_left_out(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """Refuse an optimizer that leaves out weights with gradients: a Trainer clips by the norm of these too.

    Raises:
        ConfigError: there are such weights.
    """
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for name, param in model.named_parameters():
        if param.requires_grad and id(param) not in held:
            raise ConfigError(
                f"{name} is in no group of the optimizer, but a Trainer would count its gradient in the norm that it "
                "clips by: call requires_grad_(False) of what is not to train, or give it a group with lr=0.0"
            )


def rebuilt(optimizer: torch.optim.Optimizer, module: torch.nn.Module) -> tuple[Any, list[dict[str, Any]]]:
    """What makes an optimizer as this one, and its groups with the parameters of this rank's stages alone.

    Args:
        optimizer: of the parameters of the whole model; it has not stepped.
        module: the stages, which share their parameters with the model.

    Raises:
        ConfigError: see `refuse_state`.
    """
    refuse_state(optimizer)
    here = {id(param) for param in module.parameters()}
    groups = [
        group | {"params": [param for param in group["params"] if id(param) in here]}
        for group in optimizer.param_groups
    ]
    taken = inspect.signature(type(optimizer).__init__).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in taken}
    return partial(type(optimizer), **options), groups
