"""FiniteCheck: NaN or inf in a batch is reported with stage, direction and micro-batch."""

from __future__ import annotations

import math
from typing import Any

import torch.distributed as dist
from deepspeed.utils import logger
from torch import nn

from ...errors import PipelineRuntimeError
from ...runtime.borders import Borders, Finding, origins
from ..placing.stages import params_of

_SHOWN = 4  #: micro-batches that a message lists


class FiniteCheck:
    """Looks at what passes the borders of stages, and at the gradient norm.

    Under fp16 a loss scaler looks for overflow in gradients, which is normal there: only the forward is looked at.

    Args:
        engine: the DualPipeEngine.

    Attributes:
        borders: the notes, for the executor.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._scaled = engine.fp16_enabled() or engine.torch_autocast_z0_gradscaler is not None
        self._raises = engine.dualpipe_config.check_finite
        self.borders = Borders(not self._scaled, self._params() if self._raises else None)

    def _params(self) -> dict[int, list[nn.Parameter]]:
        held = {stage: params_of(view.forward_funcs) for stage, view in self._engine._views.items()}
        return {
            stage: [param for param in self._engine.module.parameters() if param in params]
            for stage, params in held.items()
        }

    def before_step(self) -> None:
        """Before the optimizer steps. Collective over all ranks.

        Raises:
            PipelineRuntimeError: `check_finite` is set and there is a NaN or an inf; on all ranks.
        """
        if self._raises and (text := self._found()) is not None:
            raise PipelineRuntimeError(f"{text}; the optimizer has not stepped")

    def after_step(self) -> None:
        """After the optimizer has stepped: warn, once for all ranks. Collective over all ranks."""
        engine, text = self._engine, None if self._raises else self._found()
        if text is None and not self._scaled and self._norm_is_bad():
            text = (
                f"step {engine.global_steps}: the gradient norm is NaN or inf, and what passes the borders of stages "
                'is finite: it comes from a weight gradient, which "pipeline": {"check_finite": true} names, or from '
                "the sum over ranks"
            )
        if text is not None and engine.global_rank == 0:
            skipped = "; the optimizer has skipped the step" if getattr(engine.optimizer, "overflow", False) else ""
            logger.warning(text + skipped)

    def _norm_is_bad(self) -> bool:
        if getattr(self._engine.optimizer, "overflow", False):
            return True
        norm = self._engine.get_global_grad_norm()
        return norm is not None and not math.isfinite(float(norm))

    def _found(self) -> str | None:
        """The sentence for people, the same on all ranks; None: all is finite."""
        engine = self._engine
        step = engine.global_steps + self._raises  # which counts the steps that are done
        if not float(engine.totals.finish().bad):
            return None
        mine = (engine.place.replica, self.borders.findings(engine.global_rank))
        all_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(all_ranks, mine)
        of_replica: dict[int, list[Finding]] = {}
        for replica, findings in all_ranks:
            of_replica.setdefault(replica, []).extend(findings)
        parts = [
            self._describe(each, replica) for replica in sorted(of_replica) for each in origins(of_replica[replica])
        ]
        more = f"; and in {len(parts) - _SHOWN} more micro-batches" if len(parts) > _SHOWN else ""
        return f"NaN or inf in step {step}: {'; '.join(parts[:_SHOWN])}{more}"

    def _describe(self, found: Finding, replica: int) -> str:
        micro = f"micro-batch {found.micro}" + (f" of replica {replica}" if self._engine.place.replicas > 1 else "")
        return f"stage {found.stage} (rank {found.rank}), {found.direction}, {micro}: {found.text}"
