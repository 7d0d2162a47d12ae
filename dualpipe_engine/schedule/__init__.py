"""Schedules as values: generate, lower, verify, simulate and draw without importing torch."""
