"""Whole jobs estimated from a published model and hardware: time, memory, without running anything."""
