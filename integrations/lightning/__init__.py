"""Lightning: `Trainer(strategy="dualpipe")` with a `DualPipeLightningModule`. Importing this registers the strategy."""

from __future__ import annotations

from dualpipe_engine.errors import MissingExtraError

try:
    import lightning.pytorch  # noqa: F401
except ImportError as error:
    raise MissingExtraError(
        'the Lightning integration needs lightning: pip install "dualpipe_engine[lightning]"'
    ) from error

from .module import DualPipeLightningModule
from .strategy import DualPipeStrategy

__all__ = ["DualPipeLightningModule", "DualPipeStrategy"]
