"""Profiling, and what layers written for DeepSeek's `dualpipe` import from its `utils`."""

from __future__ import annotations

from .compat.weight_grad_store import WeightGradStore, run_backward
from .profiling.profiler import Profiler, disable_profiling, enable_profiling, get_profiler

__all__ = [
    "Profiler",
    "WeightGradStore",
    "disable_profiling",
    "enable_profiling",
    "get_profiler",
    "run_backward",
]
