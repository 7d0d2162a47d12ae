"""Steps apart: batches that add up gradients, and the step that takes them, as calls of their own.

A loop that is not ours (Lightning's) runs hooks between the two, and decides after how many batches to step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...comm.nest import Nest
from ...errors import ConfigError
from ...faults.watched import watched
from ..checks.copies import check_twins
from .recovery import Recovery


class PartOfStep(NamedTuple):
    """Which part of an optimizer step a batch is.

    Args:
        batches: of the step, over whose gradients it takes the mean.
        last: whether gradients are complete after this one.
        apart: whether the step is taken by another call.
    """

    batches: int = 1
    last: bool = True
    apart: bool = False


WHOLE = PartOfStep()


class StepsApart(Recovery):
    """The part of `DualPipeEngine` that steps on its own.

    Attributes:
        unstepped: batches whose gradients no step has taken.
    """

    unstepped: int = 0

    @watched
    def forward_backward(
        self, data_iter: Iterator[Nest] | None = None, batches: int = 1, last: bool = True
    ) -> torch.Tensor:
        """As `train_batch`, but without the step: gradients are added to those of the batches since the last
        `take_step`. They are reduced beside the schedule of the last one.

        Args:
            data_iter: as in `train_batch`.
            batches: of the step, over whose gradients it takes the mean.
            last: whether `take_step` follows. Where it follows nevertheless, it reduces first.

        Returns:
            The mean loss of this batch, as `train_batch` does.

        Raises:
            ConfigError: ZeRO-2, which reduces after every B and W, with several batches; or `requires_grad` was changed
                between them.
            Exception: as `train_batch`. Gradients of all batches since the last step are dropped.
        """
        with self._attempt():
            loss: torch.Tensor = self._run_batch(data_iter, PartOfStep(batches, last, apart=True))
            self.unstepped += 1
        return loss

    @watched
    def take_step(self) -> None:
        """Step the optimizer with the gradients of the batches since the last one. Collective over all ranks.

        Raises:
            ConfigError: there are none.
        """
        if not self.unstepped:
            raise ConfigError("take_step() has no gradients: call forward_backward() before", everywhere=True)
        with self._attempt():
            self._tail.take_step()
            self.unstepped = 0
            self._after_step()
        self._end_on_signal()

    def drop_gradients(self) -> None:
        """Give up the gradients of batches that were not stepped."""
        if self.unstepped:
            self._tail.forget()
            self.unstepped = 0

    def zero_grad(self) -> None:
        """Give up all gradients, as `drop_gradients` does."""
        super().zero_grad()
        self.drop_gradients()

    def _after_step(self) -> None:
        """What follows a step, with or without a batch of its own."""
        overflow = getattr(self.optimizer, "overflow", False)
        self.finite.after_step(self.global_steps, overflow, self.get_global_grad_norm)
        every = self.dualpipe_config.check_twins
        if every is not None and self.global_steps % every == 0:
            check_twins(self.module, self.mpu.get_data_parallel_group())
        self._report_batch()

    def _forget_batch(self) -> None:
        super()._forget_batch()
        self.unstepped = 0

    def _check_part(self, part: PartOfStep) -> None:
        """Raises:
        ConfigError: a batch cannot be that part of a step.
        """
        if not part.apart and self.unstepped:
            raise ConfigError(
                f"{self.unstepped} batches of forward_backward() wait for their step: call take_step(), or "
                "drop_gradients(), before train_batch()"
            )
        several = part.batches > 1 or not part.last or self.unstepped
        if several and self.zero_optimization_partition_gradients():
            raise ConfigError(
                "ZeRO-2 reduces after every B and W, so that a step cannot take several batches: use "
                '"zero_optimization": {"stage": 1}, or more micro-batches'
            )

    def _check_unchanged(self) -> None:
        """Raises:
        ConfigError: `requires_grad` was changed where gradients wait for their step.
        """
        if self.unstepped:
            raise ConfigError("requires_grad has changed between batches of one step: change it between steps")
