"""Given: what users and DeepSpeed hand to an engine, for which neither has a type of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from ..comm.nest import Nest

Settings: TypeAlias = dict[str, Any]
"""DeepSpeed's JSON, or a section of it. `config.read_config` and DeepSpeed check what is in it."""

ParamGroup: TypeAlias = dict[str, Any]
"""An entry of `param_groups` of an optimizer: "params" and options."""

Optimizer: TypeAlias = Any
"""DeepSpeed's optimizers and torch's, which have no class in common, and functions that make one."""

Scheduler: TypeAlias = Any
"""Of learning rates: DeepSpeed's and torch's, and functions that make one."""

Dataset: TypeAlias = Any
"""Samples by number, or an iterable of them: all that torch's DataLoader takes."""

Loader: TypeAlias = Any
"""Micro-batches in turn: all that DeepSpeed's RepeatingLoader takes."""

Collate: TypeAlias = Callable[[list[Nest]], Nest]
"""Makes a micro-batch of samples."""

LayerEntry: TypeAlias = Any
"""An entry of the list of a PipelineModule: a LayerSpec, a module or a function."""

LossFunction: TypeAlias = Callable[..., torch.Tensor]
"""Of the output of the last layer and labels (scalar)."""

LayerFunction: TypeAlias = Callable[..., Nest]
"""What a stage calls: a module, a function, a function bound to a module."""

ClientState: TypeAlias = dict[str, Any]
"""What the user's script saves with a checkpoint, and gets back."""

SavedState: TypeAlias = Any
"""What a file of a checkpoint holds, as torch.load returns it: mostly DeepSpeed's dicts."""

EngineAttribute: TypeAlias = Any
"""Of DeepSpeed's engine, or of the user's model, whose attributes it passes on."""

CheckpointEngine: TypeAlias = Any
"""DeepSpeed's, which has no class in common with those that clients give."""

ParamEntry: TypeAlias = Any
"""Of what an optimizer is made for: a parameter, or a `ParamGroup`; all of one kind."""
