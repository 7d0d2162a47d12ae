"""Each run of a Trainer in a process that has run others starts as in a fresh one."""

from __future__ import annotations

import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState


def forget():
    """Let accelerate, which keeps its state by process, find its surroundings anew."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def trainer_class(stock):
    """The stock Trainer or ours, for a run of its own."""
    forget()
    if stock:
        return transformers.Trainer
    from dualpipe_engine.compat import DualPipeTrainer

    return DualPipeTrainer
