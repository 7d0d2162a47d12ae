"""The norm that gradients are clipped by: that of the loop around the engine, which may change it between steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dualpipe_engine.engine.engine import DualPipeEngine

CLIPPING = "gradient_clipping"  #: key of DeepSpeed's configuration


def clip_by_norm(engine: DualPipeEngine, max_norm: float | None) -> None:
    """Let the next step clip by this norm, whatever the one before did, and the one that a checkpoint was saved of.

    Args:
        engine: that steps.
        max_norm: of the gradients of all stages; 0 or None: they are not clipped.
    """
    engine._config.gradient_clipping = float(max_norm or 0.0)
    if hasattr(engine.optimizer, "clip_grad"):  # DeepSpeed's own: ZeRO, bf16, fp16
        engine.optimizer.clip_grad = engine._config.gradient_clipping
