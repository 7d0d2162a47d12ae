"""OptimizerView: what a Trainer may see of an optimizer that the engine steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

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
