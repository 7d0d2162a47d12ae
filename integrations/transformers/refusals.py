"""What a Trainer offers and a pipeline does not have: refused when the DualPipeTrainer is made, by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import DynamoBackend
from torch._dynamo import OptimizedModule
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import Trainer, TrainerCallback, TrainingArguments

from dualpipe_engine.adapters.peft_kinds import refuse_adapters
from dualpipe_engine.errors import CheckpointError, ConfigError

#: What runs compiled, also where blocks have come from another rank.
COMPILE = "call compile() of the blocks of the model that on_train_begin of a callback is given"
#: Of DeepSpeed's configuration, what arguments of a Trainer say.
SET_BY_ARGUMENTS = {
    "optimizer": "optim= of the TrainingArguments and optimizers= of the Trainer",
    "scheduler": "lr_scheduler_type= of the TrainingArguments and optimizers= of the Trainer",
    "train_batch_size": "per_device_train_batch_size= of the TrainingArguments",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size= of the TrainingArguments and num_chunks=",
    "gradient_accumulation_steps": "num_chunks=",
}


def refuse_arguments(args: TrainingArguments) -> None:
    """Refuse arguments that would have no effect, or another one.

    Args:
        args: of the Trainer, before accelerate has read them.

    Raises:
        ConfigError: one of them is set.
    """
    for name, reason in {
        "deepspeed": "makes accelerate build its own engine: pass deepspeed_config= to DualPipeTrainer",
        "torch_compile": f"compiles a model that no rank runs: {COMPILE}",
        "auto_find_batch_size": "starts again with another batch, which an engine cannot",
        "torch_empty_cache_steps": "belongs to the Trainer's own step",
        "use_liger_kernel": "replaces the head and its loss, which run on different stages",
        "neftune_noise_alpha": "hooks an embedding that only one rank has, after the engine was made",
        "fsdp": "shards a model that no rank runs: ZeRO is set in deepspeed_config=",
        "optim_target_modules": "belongs to optimizers that hook into the backward",
        "bf16_full_eval": "casts a model that no rank runs: bf16=True trains and evaluates in bf16",
        "fp16_full_eval": "casts a model that no rank runs: fp16=True trains and evaluates in fp16",
        "include_num_input_tokens_seen": "counts the ranks of a pipeline as replicas",
        "parallelism_config": "gives ranks to accelerate that are stages here: pass num_stages= to DualPipeTrainer",
        "enable_jit_checkpoint": "saves on one rank's signal, but all ranks save together",
        "eval_use_gather_object": "gathers objects of all ranks, but outputs travel as tensors",
        "save_on_each_node": "saves a model that only the first node has gathered",
        "debug": "hooks a model that no rank runs",
    }.items():
        if getattr(args, name, None) not in (None, False, "", "no", [], {}):
            raise ConfigError(f"TrainingArguments({name}=...) {reason}; leave it out")
    if args.gradient_accumulation_steps != 1:
        raise ConfigError("gradient_accumulation_steps must be 1: raise num_chunks and per_device_train_batch_size")
    if args.save_only_model and args.load_best_model_at_end:
        raise ConfigError(
            "save_only_model=True leaves out the state of the engine, from which load_best_model_at_end=True loads: "
            "leave one of them out"
        )
    if args.train_sampling_strategy == "batch_rebalance":
        raise ConfigError(
            'train_sampling_strategy="batch_rebalance" deals rows out to ranks that read the same batch here: use '
            '"group_by_length"'
        )
    for name in ("split_batches", "dispatch_batches", "gradient_accumulation_kwargs"):
        if getattr(args.accelerator_config, name, None):
            raise ConfigError(f"accelerator_config={{{name!r}: ...}} is about loaders of all ranks; leave it out")


def refuse_replicas(args: TrainingArguments, replicas: int) -> None:
    """Refuse an argument that means something where there are replicas.

    Args:
        args: of the Trainer.
        replicas: of the pipeline, with batches of their own.

    Raises:
        ConfigError: it is set.
    """
    if replicas > 1 and not args.average_tokens_across_devices:
        raise ConfigError(
            f"average_tokens_across_devices=False weights {replicas} replicas by their own tokens, but the engine adds "
            "up all of them: leave it out"
        )


def refuse_launcher(trainer: Trainer, sections: Mapping[str, Any]) -> None:
    """Refuse what `accelerate launch` and its environment would have accelerate do.

    Args:
        trainer: with its accelerator.
        sections: of DeepSpeed's configuration, of the user.

    Raises:
        ConfigError: it shards or compiles a model that no rank runs, or its precision is none of the engine's, or
            another than that of `sections`.
    """
    accelerator = trainer.accelerator
    dynamo = getattr(accelerator.state, "dynamo_plugin", None)
    for there, name in (
        (trainer.is_deepspeed_enabled, "DeepSpeed"),
        (trainer.is_fsdp_enabled, "FSDP"),
        (dynamo is not None and dynamo.backend != DynamoBackend.NO, "TorchDynamo"),
    ):
        if there:
            raise ConfigError(
                f"accelerate is set up for {name}, but no rank runs the model that it would wrap: start with torchrun, "
                "or with an accelerate configuration without it"
            )
    precision = str(accelerator.mixed_precision)
    if precision not in ("no", "bf16", "fp16"):
        raise ConfigError(f'mixed precision "{precision}" of accelerate is none of the engine\'s: use "bf16"')
    if not sections.get(precision, {}).get("enabled", True):
        raise ConfigError(
            f'"{precision}": {{"enabled": false}} in deepspeed_config= contradicts the TrainingArguments, or '
            "accelerate: leave one of them out"
        )


def refuse_hooks(trainer: Trainer, num_chunks: int = 1) -> None:
    """Refuse what a subclass, an argument or the model changes without an effect here, or with another one.

    Args:
        trainer: with its model.
        num_chunks: micro-batches of a batch.

    Raises:
        ConfigError: there is such a thing.
    """
    if trainer.model_init is not None:
        raise ConfigError("model_init= makes a new model for each train(), but the engine keeps its own: pass model=")
    kind = type(trainer)
    for name, instead in {
        "create_optimizer_and_scheduler": "create_optimizer and create_scheduler",
        "get_batch_samples": "the data collator",
        "get_train_dataloader": "_get_train_sampler or the data collator, as all ranks of a pipeline read one batch",
        "get_eval_dataloader": "_get_eval_sampler or the data collator, as all ranks of a pipeline read one batch",
        "get_test_dataloader": "_get_eval_sampler or the data collator, as all ranks of a pipeline read one batch",
        "_inner_training_loop": "training_step",
    }.items():
        if getattr(kind, name, None) is not getattr(Trainer, name, None):
            raise ConfigError(f"{kind.__name__}.{name} would not be called as in a Trainer: override {instead}")
    refuse_adapters(trainer.model)
    _refuse_whole(trainer.model)
    for name, part in trainer.model.named_modules():
        if num_chunks > 1 and isinstance(part, _BatchNorm):
            raise ConfigError(
                f"{name} ({type(part).__name__}) takes its statistics from the whole batch, which is cut into "
                f"{num_chunks} micro-batches: use num_chunks=1"
            )


def _refuse_whole(model: Any) -> None:  # noqa: ANN401
    if isinstance(model, OptimizedModule) or getattr(model, "_compiled_call_impl", None) is not None:
        raise ConfigError(f"the model is compiled as a whole, which no rank runs: leave it as it was, and {COMPILE}")
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(getattr(model, "config", None), name, False):
            raise ConfigError(
                f"model.config.{name}=True adds outputs of blocks, which stay on their stages: set it to False, and "
                "register forward hooks on the blocks to see them"
            )


def refuse_callback(callback: type[TrainerCallback] | TrainerCallback) -> None:
    """Refuse a callback that comes between the backward and the step of the optimizer, which are one here.

    Raises:
        ConfigError: it has an `on_pre_optimizer_step`.
    """
    kind = callback if isinstance(callback, type) else type(callback)
    if getattr(kind, "on_pre_optimizer_step", None) is not TrainerCallback.on_pre_optimizer_step:
        raise ConfigError(
            f"{kind.__name__}.on_pre_optimizer_step would see no gradients, and the weights after the step, which the "
            "engine takes at the end of a batch: use param.register_hook for gradients, on_step_end for the rest"
        )


def refuse_folder(folder: Path, part: str) -> None:
    """Refuse to resume from what is no checkpoint.

    Args:
        folder: that is given.
        part: folder within, of the engine's state.

    Raises:
        CheckpointError: one of them is not there.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not there to resume from: pass one of the folders checkpoint-N that were saved"
        )
    if not (folder / part).is_dir():
        raise CheckpointError(f"{folder} holds no state of an engine: was it saved with save_only_model?")
