"""Costs of ops, and the time and memory that a plan takes under them: simulated, bounded, or measured.

Nothing here makes or changes a plan.
"""
