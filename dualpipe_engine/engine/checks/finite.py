"""FiniteCheck: NaN or inf in a batch is reported with stage, direction and micro-batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from deepspeed.utils import logger
from torch import Tensor, nn

from ...comm.from_all import from_all
from ...errors import PipelineRuntimeError
from ...runtime.borders import Borders, NonFinite, origins

_SHOWN = 4  #: micro-batches that a message lists


class FiniteCheck:
    """Looks at what passes the borders of stages, and at the gradient norm.

    Under fp16 a loss scaler looks for overflow in gradients, which is normal there: only the forward is looked at.

    Args:
        params: stage -> its parameters, whose gradients are looked at too; None: they are not, and nothing is raised.
        scaled: whether there is a loss scaler.
        rank: of this process, in the world.
        replica: of the pipeline.
        replicas: how many there are.
        bad: how many notes of all ranks hold a NaN or an inf. Collective over all ranks at the first call of a batch.

    Attributes:
        borders: the notes, for the executor.
    """

    def __init__(
        self,
        params: Mapping[int, Sequence[nn.Parameter]] | None,
        scaled: bool,
        rank: int,
        replica: int,
        replicas: int,
        bad: Callable[[], Tensor],
    ) -> None:
        self._raises, self._scaled, self._bad = params is not None, scaled, bad
        self._rank, self._replica, self._replicas = rank, replica, replicas
        self.borders = Borders(not scaled, params)

    def before_step(self, step: int) -> None:
        """Before the optimizer steps. Collective over all ranks.

        Args:
            step: its number.

        Raises:
            PipelineRuntimeError: `check_finite` is set and there is a NaN or an inf; on all ranks.
        """
        if self._raises and (text := self._found(step)) is not None:
            raise PipelineRuntimeError(f"{text}; the optimizer has not stepped", everywhere=True)

    def after_step(self, step: int, overflow: bool, norm: Callable[[], float | Tensor | None]) -> None:
        """After the optimizer has stepped: warn, once for all ranks. Collective over all ranks.

        Args:
            step: its number.
            overflow: whether the optimizer has skipped it.
            norm: of all gradients; None: unknown.
        """
        text = None if self._raises else self._found(step)
        if text is None and not self._scaled and (overflow or _is_bad(norm())):
            text = (
                f"step {step}: the gradient norm is NaN or inf, and what passes the borders of stages "
                'is finite: it comes from a weight gradient, which "pipeline": {"check_finite": true} names, or from '
                "the sum over ranks"
            )
        if text is not None and self._rank == 0:
            logger.warning(text + ("; the optimizer has skipped the step" if overflow else ""))

    def _found(self, step: int) -> str | None:
        """The sentence for people, the same on all ranks; None: all is finite."""
        if not float(self._bad()):
            return None
        of_replica: dict[int, list[NonFinite]] = {}
        for replica, findings in from_all((self._replica, self.borders.findings(self._rank))):
            of_replica.setdefault(replica, []).extend(findings)
        parts = [
            self._describe(each, replica) for replica in sorted(of_replica) for each in origins(of_replica[replica])
        ]
        more = f"; and in {len(parts) - _SHOWN} more micro-batches" if len(parts) > _SHOWN else ""
        return f"NaN or inf in step {step}: {'; '.join(parts[:_SHOWN])}{more}"

    def _describe(self, found: NonFinite, replica: int) -> str:
        micro = f"micro-batch {found.micro}" + (f" of replica {replica}" if self._replicas > 1 else "")
        return f"stage {found.stage} (rank {found.rank}), {found.direction}, {micro}: {found.text}"


def _is_bad(norm: float | Tensor | None) -> bool:
    return norm is not None and not math.isfinite(float(norm))
