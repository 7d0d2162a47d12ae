"""Drawings, traces and tables of one `Timeline`, simulated or measured. Nothing here imports torch."""
