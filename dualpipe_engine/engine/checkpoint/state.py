"""What a checkpoint keeps beside DeepSpeed's own state: random generators, and what the universal converter needs."""

from __future__ import annotations

import random
import re
from typing import TypedDict

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint.constants import (
    AUTOTP_UNSUPPORTED_PARAMETER_PATTERNS,
    PIPELINE_REPLICATED_PARAMETER_PATTERNS,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.activation_checkpointing import checkpointing
from torch import Tensor

from ...comm.from_all import from_all
from ...errors import CheckpointError
from ..placing.experts import has_experts
from ..placing.loss import loss_module


class RandomState(TypedDict):
    """Of the random generators of a rank.

    Attributes:
        python: of `random`.
        numpy: of `numpy.random`.
        torch: of torch on the CPU.
        device: of the accelerator; None on the CPU.
        tracker: of DeepSpeed's activation checkpointing, by name.
    """

    python: tuple[object, ...]
    numpy: dict[str, object] | tuple[str, np.ndarray, int, int, float]
    torch: Tensor
    device: Tensor | None
    tracker: dict[str, Tensor]


def random_state(device: torch.device) -> RandomState:
    """The state of every random generator that a layer may draw from on this rank."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": None if device.type == "cpu" else get_accelerator().get_rng_state(device),
        "tracker": checkpointing.get_cuda_rng_tracker().get_states(),
    }


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Take up what `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["device"] is not None and device.type != "cpu":
        get_accelerator().set_rng_state(state["device"], device)
    checkpointing.get_cuda_rng_tracker().set_states(state["tracker"])


def check_ties(module: PipelineModule) -> None:
    """DeepSpeed writes no file of a tied layer with a `forward_fn`.

    Raises:
        CheckpointError: all layers of a tie have one, so that no file would hold its weights.
    """
    tied = [spec for spec in module._layer_specs if isinstance(spec, TiedLayerSpec)]
    lost = {spec.key for spec in tied} - {spec.key for spec in tied if spec.forward_fn is None}
    if lost:
        raise CheckpointError(
            f"no file would hold the weights tied as {sorted(lost)}: give one of these TiedLayerSpecs no forward_fn",
            everywhere=True,
        )


def universal_info(module: PipelineModule) -> dict[str, object]:
    """What DeepSpeed's universal converter must know of a pipeline. Collective over all ranks.

    It looks for "universal_checkpoint_info" in the saved state, where DeepSpeed puts the module's attribute of that
    name.

    Weights tied between pipeline positions are saved by each of them. The converter takes those of position 0 and skips
    the others; a tie without position 0 it would mix up, so it is told to refuse.
    """
    positions: dict[str, set[int]] = {}
    for layer, spec in enumerate(module._layer_specs):
        if isinstance(spec, TiedLayerSpec):
            positions.setdefault(spec.key, set()).add(module.stage_owner(layer))
    shared = {rf"tied_modules\.{re.escape(key)}\.": held for key, held in positions.items() if len(held) > 1}
    refused = {
        pattern: f"it is tied between pipeline positions {sorted(held)}, none of which is the first"
        for pattern, held in shared.items()
        if 0 not in held
    }
    replicated = [pattern for pattern, held in shared.items() if 0 in held]
    if loss_module(module) is not None:  # each position has one, and the last stage trains it
        if module.stage_owner(len(module._layer_specs) - 1) == 0:
            replicated.append(r"loss_fn\.")
        else:
            refused[r"loss_fn\."] = "it is trained at the last pipeline position: convert it with `dualpipe convert`"
    if module._grid.model_parallel_size > 1:
        refused[".*"] = (
            "the model is tensor parallel: say how its parameters are cut, in "
            "save_checkpoint(client_state={'universal_checkpoint_info': ...})"
        )
    if any(from_all(has_experts(module))):  # it would take the share of one rank for the whole
        refused[".*"] = "ranks share the experts of its layers: convert it with `dualpipe convert`"
    return {
        UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE,
        PIPELINE_REPLICATED_PARAMETER_PATTERNS: replicated,
        AUTOTP_UNSUPPORTED_PARAMETER_PATTERNS: refused,
    }
