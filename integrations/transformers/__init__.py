"""Hugging Face's Trainer on a DualPipe pipeline."""

from __future__ import annotations

from dualpipe_engine.errors import MissingExtraError

try:
    import accelerate  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise MissingExtraError('the Trainer needs transformers: pip install "dualpipe_engine[hf]"') from error

from .trainer import DualPipeTrainer

__all__ = ["DualPipeTrainer"]
