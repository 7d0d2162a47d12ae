"""Tools beside the engine: profiling."""

from __future__ import annotations

from .runtime.profiler import Profiler, disable_profiling, enable_profiling, get_profiler

__all__ = ["Profiler", "disable_profiling", "enable_profiling", "get_profiler"]
