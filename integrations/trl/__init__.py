"""TRL's trainers on a DualPipe pipeline."""

from __future__ import annotations

from dualpipe_engine.errors import MissingExtraError

try:
    import trl  # noqa: F401
except ImportError as error:
    raise MissingExtraError('the trainers of TRL need it: pip install "dualpipe_engine[trl]"') from error

from .dpo import DualPipeDPOTrainer
from .sft import DualPipeSFTTrainer

__all__ = ["DualPipeDPOTrainer", "DualPipeSFTTrainer"]
