"""Gradients between a backward and the optimizer's step: how copies of a stage bring theirs together.

One file a reduction, behind the interface in `interface`; `choose` picks one by the optimizer, `tail` drives it.
"""
