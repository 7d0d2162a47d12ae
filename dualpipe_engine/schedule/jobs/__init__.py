"""Whole jobs from a published model and hardware, without running anything: time, memory, what makes them fit."""
