"""Adapters of PEFT that are more than a change of the blocks, of which stages are made."""

from __future__ import annotations

from torch import nn

from ..errors import ConfigError

#: Settings of an adapter by which a PEFT model acts outside of the blocks, and why stages do not follow.
OUTSIDE = {
    "is_prompt_learning": "puts a prompt before the whole model, which stages do not see",
    "alora_invocation_tokens": "begins at a token that the PEFT model looks for in the batch, and does not tell stages",
    "target_modules_to_tie": "makes the adapter of the head of that of the embedding, which are on two stages",
    "use_asa": "chooses parts by gradients, which are gone when the engine has stepped",
}


def refuse_adapters(model: nn.Module) -> None:
    """Refuse adapters that are more than a change of the blocks.

    Args:
        model: a PEFT model, the model within one, or any other.

    Raises:
        ConfigError: one is, such as a prompt, aLoRA, or AdaLoRA with its own term of the loss.
    """
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        for setting, reason in OUTSIDE.items():
            if getattr(config, setting, None):
                raise ConfigError(
                    f"the PEFT adapter {name!r} ({setting}) {reason}: use LoRA or another kind that changes the blocks"
                )
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
        from peft.tuners.tuners_utils import BaseTuner

        tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
        if issubclass(tuner, BaseTuner) and tuner.forward is not BaseTuner.forward:
            raise ConfigError(
                f"the PEFT adapter {name!r} is of {tuner.__name__}, which has a forward of its own around the model, "
                "with more inputs or terms of the loss, that stages do not run: use LoRA or another kind that changes "
                "the blocks"
            )
