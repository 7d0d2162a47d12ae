"""What TRL offers and a pipeline does not have: refused when the trainer is made, by name."""

from __future__ import annotations

from typing import Any

from trl import DPOConfig, SFTConfig

from dualpipe_engine.errors import ConfigError

#: Losses that are no mean over pairs: micro-batches do not add up to the batch.
OVER_THE_BATCH = {"aot", "aot_unpaired", "sft"}


def refuse_settings(args: SFTConfig | DPOConfig, num_chunks: int) -> None:
    """Refuse arguments of TRL that would have no effect, or another one.

    Args:
        args: of the trainer.
        num_chunks: micro-batches of a batch.

    Raises:
        ConfigError: one of them is set.
    """
    if args.activation_offloading:
        raise ConfigError(
            'activation_offloading=True hooks a model that no rank runs: use deepspeed_config={"pipeline": '
            '{"offload_activations": true}}'
        )
    if isinstance(args, DPOConfig):
        if args.sync_ref_model:
            raise ConfigError("sync_ref_model=True mixes weights of two models whose stages are apart; leave it out")
        if OVER_THE_BATCH & set(args.loss_type) and num_chunks > 1:
            raise ConfigError(f"loss_type={args.loss_type} is no mean over pairs: use num_chunks=1")
    elif args.padding_free or (args.packing and args.packing_strategy != "wrapped"):
        raise ConfigError(
            'padding_free=True, as other packing than "wrapped", makes batches of one row, which cannot be cut into '
            'micro-batches: use padding_free=False and packing_strategy="wrapped"'
        )


def refuse_data(trainer: Any) -> None:  # noqa: ANN401
    """Refuse data and models of a trainer that TRL has made.

    Raises:
        ConfigError: batches have images, or the model's experts an auxiliary loss.
    """
    if trainer._is_vision_dataset:
        raise ConfigError("the images of a batch have no rows to be cut along: train on text, or by a DualPipeTrainer")
    if trainer.aux_loss_enabled:
        raise ConfigError("the auxiliary loss of experts is not there in one micro-batch: router_aux_loss_coef=0.0")
