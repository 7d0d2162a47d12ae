"""The adapters of a PEFT model on its stages.

A stage that has travelled to a rank is another object than the part of the user's model that it was: what switches the
adapters of that model does not reach it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper


@contextmanager
def adapter_of_stages(stages: torch.nn.Module, name: str | None) -> Iterator[None]:
    """Within, another adapter computes; as `trl.trainer.utils.use_adapter` for a whole model.

    Args:
        stages: of this rank.
        name: of the adapter; None for the model without one.
    """
    parts = [part for part in stages.modules() if isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    before = [(part, part.active_adapters) for part in parts]
    trained = [param for param in stages.parameters() if param.requires_grad]
    try:
        for part in parts:
            if name is None:
                part.enable_adapters(False)
            else:
                part.set_adapter(name)
        yield
    finally:
        for part, active in before:
            part.set_adapter(active)
            part.enable_adapters(True)
        stages.requires_grad_(False)
        for param in trained:
            param.requires_grad_(True)
