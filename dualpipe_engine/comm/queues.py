"""Hardware queues, which the streams of a process share on NVIDIA GPUs: whether there are enough."""

from __future__ import annotations

import torch

from ..errors import ConfigError
from ..schedule.plan import Plan

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"  #: how many a process has; CUDA reads it when it starts
ENOUGH = 8  #: CUDA's default


def check_queues(plan: Plan, dynamic_shape: bool, device: torch.device, most: str | None) -> None:
    """Refuse shapes that change where transfers would wait for each other for good.

    The receive of a message whose shape comes with a header cannot lie ready for it. So the message keeps its stream
    until the receiver needs it, what follows on that stream keeps the hardware queue, and what the receiver waits for
    may stand behind it. With one stage a rank nothing does.

    Args:
        plan: for training.
        dynamic_shape: whether a header goes before every forward message.
        device: of the tensors.
        most: the value of `VARIABLE`; None: it is not set.

    Raises:
        ConfigError: the plan may not come to its end.
    """
    few = most is not None and most.isdigit() and int(most) < ENOUGH
    one_stage = plan.placement.num_directions * plan.placement.parts == 1
    if dynamic_shape and few and not one_stage and device.type == "cuda" and torch.version.hip is None:
        raise ConfigError(
            f'dynamic_shape=True and the schedule "{plan.schedule}" may wait for ever with {VARIABLE}={most}, since '
            f"no receive can be posted before its shape is known: unset it, set it to {ENOUGH} or more before CUDA "
            'starts, or use "1f1b" or "zb1p"'
        )
