"""Layers cut into stages: balanced by their times, or the fastest cut by simulation."""
