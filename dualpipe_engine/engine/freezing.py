"""Freezing: `requires_grad` may change between steps; W, reductions and copies follow."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError


class TrainedParams:
    """Which parameters are trained, as of the last step.

    Args:
        engine: the DualPipeEngine.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._names = [name for name, _ in engine.module.named_parameters()]
        self._params = list(engine.module.parameters())
        self._flags = self._now()

    def _now(self) -> list[bool]:
        return [param.requires_grad for param in self._params]

    def changed(self) -> bool:
        """Whether `requires_grad` of any parameter of this rank has changed since the last call.

        Raises:
            ConfigError: it has, and the optimizer works on flat copies, where DeepSpeed would go on moving what is
                frozen and never move what is not.
        """
        now = self._now()
        if now == self._flags:
            return False
        before, self._flags = self._flags, now
        if hasattr(self._engine.optimizer, "optimizer"):
            name = next(n for n, old, new in zip(self._names, before, now, strict=True) if old != new)
            raise ConfigError(
                f"requires_grad of {name} has changed, but {type(self._engine.optimizer).__name__} has made its flat "
                'groups of what was trained at initialize: use "zero_optimization": {"stage": 0} in fp32 to freeze and '
                "unfreeze between steps"
            )
        return True
