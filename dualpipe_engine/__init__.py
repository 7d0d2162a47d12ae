"""DualPipe for DeepSpeed: bidirectional pipeline parallelism, chosen in the DeepSpeed JSON.

    import dualpipe_engine
    engine, *_ = dualpipe_engine.initialize(args=args, model=pipeline_module, config="ds.json")
    loss = engine.train_batch(data_iter)

Schedules can be made, verified, simulated and drawn without torch (`dualpipe_engine.schedule`, the `dualpipe` command);
everything that needs torch or DeepSpeed is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, DualPipeError, MissingExtraError, PipelineRuntimeError, PlanError

if TYPE_CHECKING:
    from .compat.deepseek import DualPipe, DualPipeV, set_p2p_tensor_dtype, set_p2p_tensor_shapes
    from .compat.deepspeed_schedule import DualPipeSchedule
    from .compat.weight_grad_store import WeightGradStore
    from .engine.engine import DualPipeEngine
    from .engine.initialize import initialize

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "DualPipe",
    "DualPipeEngine",
    "DualPipeError",
    "DualPipeSchedule",
    "DualPipeV",
    "MissingExtraError",
    "PipelineRuntimeError",
    "PlanError",
    "WeightGradStore",
    "initialize",
    "set_p2p_tensor_dtype",
    "set_p2p_tensor_shapes",
]

_LAZY = {
    "DualPipe": "compat.deepseek",
    "DualPipeEngine": "engine.engine",
    "DualPipeSchedule": "compat.deepspeed_schedule",
    "DualPipeV": "compat.deepseek",
    "WeightGradStore": "utils",
    "initialize": "engine.initialize",
    "set_p2p_tensor_dtype": "compat.deepseek",
    "set_p2p_tensor_shapes": "compat.deepseek",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
