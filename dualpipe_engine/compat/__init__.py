"""At home for code written for other packages: DeepSeek's `dualpipe`, Lightning and Hugging Face."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualpipe_engine.integrations.lightning import DualPipeLightningModule
    from dualpipe_engine.integrations.transformers import DualPipeTrainer

    from .deepseek import DualPipe, DualPipeV, set_p2p_tensor_dtype, set_p2p_tensor_shapes

__all__ = [
    "DualPipe",
    "DualPipeLightningModule",
    "DualPipeTrainer",
    "DualPipeV",
    "set_p2p_tensor_dtype",
    "set_p2p_tensor_shapes",
]

_LAZY = {
    "DualPipe": "dualpipe_engine.compat.deepseek",
    "DualPipeLightningModule": "dualpipe_engine.integrations.lightning",
    "DualPipeTrainer": "dualpipe_engine.integrations.transformers",
    "DualPipeV": "dualpipe_engine.compat.deepseek",
    "set_p2p_tensor_dtype": "dualpipe_engine.compat.deepseek",
    "set_p2p_tensor_shapes": "dualpipe_engine.compat.deepseek",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
