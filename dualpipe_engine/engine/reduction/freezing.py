"""Freezing: `requires_grad` may change between steps; W, reductions and copies follow."""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist

from ...errors import ConfigError
from ..context import Context
from ..given import Optimizer
from ..placing.param_groups import PLACEHOLDER


class TrainedParams:
    """Which parameters are trained, as of the last step.

    Args:
        context: of the engine.

    Attributes:
        reduced: the parameters whose gradients reductions expect: those trained at the last step, and all that a flat
            optimizer holds.
        news: name of a parameter of this rank whose `requires_grad` has changed before this batch; None: there is none.
        balance: an integer made of the names of what is trained, which adds up to 0 over all copies that train the
            same. It travels with the loss, so that comparing costs no collective.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self.restart()

    def restart(self) -> None:
        """The optimizer is another one: take what is trained now as what was trained at first."""
        module = self._context.module
        pairs = [pair for pair in module.named_parameters() if not pair[0].startswith(PLACEHOLDER)]
        self._names = [name for name, _ in pairs]
        self._params = [param for _, param in pairs]
        self._flags = self._at_first = self._now()
        self.reduced = [param for param in module.parameters() if param.requires_grad]
        self.news: str | None = None
        self.balance = self._balance()

    def _now(self) -> list[bool]:
        return [param.requires_grad for param in self._params]

    def _balance(self) -> int:
        trained = [name for name, flag in zip(self._names, self._flags, strict=True) if flag]
        group = self._context.groups.copies
        weight = dist.get_world_size(group) - 1 if dist.get_rank(group) == 0 else -1
        return weight * zlib.crc32("\n".join(trained).encode())

    def changed(self) -> bool:
        """Whether `requires_grad` of any parameter of this rank has changed since the last call.

        Raises:
            ConfigError: it has, and the optimizer works on flat copies, where DeepSpeed would go on moving what is
                frozen and never move what is not.
        """
        now = self._now()
        self.news = None
        if now == self._flags:
            return False
        self.news = next(n for n, old, new in zip(self._names, self._flags, now, strict=True) if old != new)
        unknown = any(new and not first for new, first in zip(now, self._at_first, strict=True))
        if self._flat and (unknown or not _rests_without_gradient(self._context.optimizer.optimizer)):
            raise ConfigError(
                f"requires_grad of {self.news} has changed, but {type(self._context.optimizer).__name__} has made its "
                "flat groups of what was trained at initialize, and only plain SGD leaves at rest what has no "
                'gradient: use "zero_optimization": {"stage": 0} in fp32 to freeze and unfreeze between steps'
            )
        self._flags = now
        self.balance = self._balance()
        return True

    @property
    def _flat(self) -> bool:
        return hasattr(self._context.optimizer, "optimizer")

    def settle(self) -> bool:
        """All copies have followed; whether reductions expect others now."""
        if not self._flat:
            self.reduced = [param for param in self._context.module.parameters() if param.requires_grad]
        return not self._flat

    def agreed(self) -> bool:
        """Whether all copies of each stage train the same. Collective over all ranks at the first call of a batch."""
        return not float(self._context.totals.finish().balance)

    def check(self) -> None:
        """At the end of a batch.

        Raises:
            ConfigError: copies of a stage do not train the same; on all ranks.
        """
        if not self.agreed():
            what = "some layers" if self.news is None else self.news
            raise ConfigError(
                f"requires_grad of {what} has changed on some of the ranks that hold a copy: change it on all ranks, "
                "by the names of engine.module.named_parameters()",
                everywhere=True,
            )


def _rests_without_gradient(optimizer: Optimizer) -> bool:
    """Whether a parameter whose gradient is 0 stays as it is: nothing but plain SGD, without momentum and decay."""
    plain = type(optimizer) is torch.optim.SGD
    return plain and not any(group["momentum"] or group["weight_decay"] for group in optimizer.param_groups)
