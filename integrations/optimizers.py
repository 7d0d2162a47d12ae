"""Optimizers that give other numbers under the engine: refused by name, whatever loop they are given to."""

from __future__ import annotations

import torch

from dualpipe_engine.errors import ConfigError

#: Optimizers that hook into the backward, or are switched between training and evaluation: the engine does neither.
OWN_LOOP = ("galore", "apollo", "lomo", "schedule_free", "layerwise")
#: Optimizers that look at whole weights, or pack their state in blocks of them; ZeRO gives them parts of flat buffers.
WHOLE_WEIGHTS = (
    "adafactor",
    "8bit",
    "4bit",
    "bnb",
    "stable_adamw",
    "torchao",
    "lamb",
    "lars",
    "muon",
    "shampoo",
    "soap",
)


def refuse_optimizer(name: str, in_parts: bool) -> None:
    """Refuse optimizers that give other numbers under the engine.

    Args:
        name: of TrainingArguments(optim=...), or of the class.
        in_parts: it sees flat buffers or parts of them: ZeRO, bf16 or fp16.

    Raises:
        ConfigError: it is one of them.
    """
    plain = name.lower()
    if any(each in plain for each in OWN_LOOP):
        raise ConfigError(f"the optimizer {name} needs a training loop of its own: use one that only has step()")
    if in_parts and any(each in plain for each in WHOLE_WEIGHTS):
        raise ConfigError(
            f"the optimizer {name} looks at whole weights, but ZeRO, bf16 and fp16 give it parts of flat ones: use "
            'deepspeed_config={"zero_optimization": {"stage": 0}} in fp32, or AdamW'
        )
    if in_parts and plain == "adagrad":
        raise ConfigError(
            "DeepSpeed makes an Adagrad of its own under ZeRO, for one group of parameters, and a Trainer has two: use "
            'deepspeed_config={"zero_optimization": {"stage": 0}} in fp32, or AdamW'
        )


def refuse_state(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that has stepped.

    Raises:
        ConfigError: it has state.
    """
    if optimizer.state:
        raise ConfigError("the optimizer has stepped before: its state cannot be moved to the stages; pass a new one")
