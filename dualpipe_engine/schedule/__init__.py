"""Schedules as values: generate, lower, verify, simulate and draw without importing torch.

Here: the types that everything else is about (`Op`, `Placement`, `Plan`, `Timeline`), and the records of a run that are
made of them. What makes a plan, changes it, times it or chooses among several has a folder. Nothing here runs a plan.
"""
