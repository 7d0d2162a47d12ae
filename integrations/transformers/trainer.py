"""DualPipeTrainer: Hugging Face's Trainer, whose training and evaluation steps run on a pipeline of stages."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput

import dualpipe_engine
from dualpipe_engine.adapters import ModelAdapter, gather_state_dict, get_model_adapter
from dualpipe_engine.engine.placing.sequences import read_sizes, readers_of
from dualpipe_engine.errors import ConfigError
from dualpipe_engine.models.autoep.section import NAME as EXPERT_PARALLEL
from dualpipe_engine.models.autoep.section import read_section

from ..clipping import CLIPPING, clip_by_norm
from ..elsewhere import load_from, load_weights
from ..optimizers import refuse_optimizer
from ..random_streams import StageRandomness, follow_first
from ..sections import read_sections
from .batches import Batch, Model
from .evaluation import PipelineEvaluation
from .loaders import PipelineLoaders
from .loss import StandIn, TrainerLoss
from .masters import masters
from .optimizer import OptimizerView, rebuilt, refuse_left_out
from .refusals import (
    SET_BY_ARGUMENTS,
    refuse_arguments,
    refuse_callback,
    refuse_folder,
    refuse_hooks,
    refuse_launcher,
    refuse_replicas,
)
from .routed_loss import RoutedLoss
from .shared_loss import SharedLoss, refuse_other_losses
from .stages import on_stages
from .whole_model import Pipeline, adapters_enabled, base_model, hold_stages, refuse_calls, refuse_stages, whole_names

if TYPE_CHECKING:
    from deepspeed.pipe import PipelineModule

    from dualpipe_engine.engine.engine import DualPipeEngine

ENGINE_TAG = "engine"  #: folder of the engine's own state in a Trainer's checkpoint
SCHEDULER = "scheduler.pt"


class DualPipeTrainer(PipelineLoaders, PipelineEvaluation):
    """A Trainer for models that are too large for one device: every process runs some stages of the model.

    Start it with a launcher (`torchrun`, `deepspeed`), one process a device. `per_device_train_batch_size` is the batch
    of one pipeline: it is cut into `num_chunks` micro-batches, and all ranks of a pipeline read the same batch. Batches
    of other lengths or fewer rows are cut into as many micro-batches as they have rows. `gradient_accumulation_steps`
    must be 1: micro-batches are what accumulates.

    Losses, gradient norms and learning rates are those of a Trainer in one process on the same batches: the last stage
    calls `compute_loss`, overridden or not (`loss.py`). Optimizers, learning rate schedules, callbacks, evaluation,
    metrics, checkpoints and resume work as there; what does not is refused here (`refusals.py`). `save_model` gathers
    the stages, in fp32 where the model was, into a folder that `from_pretrained` loads; `trainer.model` itself has the
    trained weights of this rank's stages only.

    Args:
        model: a model that `get_model_adapter` can cut, PEFT models included.
        args: TrainingArguments without a DeepSpeed configuration.
        num_chunks: micro-batches of a batch; at least twice the number of stages keeps the pipeline full.
        schedule: as "schedule" in the "pipeline" section of the configuration.
        num_stages: pipeline ranks; by default all processes. More processes than stages make replicas.
        deepspeed_config: sections added to the configuration that the Trainer makes, for instance
            `{"zero_optimization": {"stage": 0}}`.
        expert_parallel: the section of that name: experts of the model are shared by replicas, for instance
            `{"enabled": True, "autoep_size": 2}`. How evenly they are used goes to the logs.
        enable_profiling: keep a profile of the run in `dualpipe_profile.json` in the output folder.
        resume_elsewhere: let `train(resume_from_checkpoint=...)` take checkpoints that another number of ranks or
            another schedule has saved, under ZeRO-1 and ZeRO-2, and in fp32 without ZeRO.
        example_inputs: a small batch without labels, as for `get_model_adapter`: for models that read more than tokens.
        options: as for `Trainer`.

    Raises:
        ConfigError: the arguments do not fit a pipeline; the message says what to change.
    """

    lr_scheduler: Any

    def __init__(
        self,
        model: Model = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        num_chunks: int = 8,
        schedule: str = "dualpipe",
        num_stages: int | None = None,
        deepspeed_config: Mapping[str, Any] | None = None,
        expert_parallel: Mapping[str, Any] | None = None,
        enable_profiling: bool = False,
        resume_elsewhere: bool = False,
        example_inputs: Batch | None = None,
        **options: Any,
    ) -> None:
        self._engine: DualPipeEngine | None = None
        self._is_alone = False
        self._stage_randomness = StageRandomness()
        self._num_chunks, self._schedule, self._example = num_chunks, schedule, example_inputs
        self._extra = read_sections(deepspeed_config, SET_BY_ARGUMENTS)
        if expert_parallel is not None:
            if EXPERT_PARALLEL in self._extra:
                raise ConfigError("expert_parallel= is in deepspeed_config= too: leave one of them out")
            self._extra[EXPERT_PARALLEL] = dict(expert_parallel)
        self._profiling, self._resume_elsewhere = enable_profiling, resume_elsewhere
        if args is not None:
            refuse_arguments(args)
        if positional:
            super().__init__(model, args, *positional, **options)
        else:
            super().__init__(model=model, args=args, **options)
        self._given = getattr(base_model(self.model), "dtype", torch.float32)  # what a Trainer would save
        self._ops_of_one = super().floating_point_ops({self._main_input(): torch.zeros(1)})
        refuse_launcher(self, self._extra)
        refuse_hooks(self, self._num_chunks)
        for callback in self.callback_handler.callbacks:
            refuse_callback(callback)
        if self._num_chunks < 1:
            raise ConfigError(f"num_chunks must be at least 1, got {self._num_chunks}")
        if not dist.is_initialized():
            raise ConfigError("there is no process group: start with a launcher, such as `torchrun --nproc-per-node 2`")
        world = dist.get_world_size()
        self._stages = num_stages or world
        if world % self._stages:
            raise ConfigError(f"{world} processes are no multiple of {self._stages} stages: change num_stages")
        self._replicas = world // self._stages
        self._readers = readers_of(read_sizes(self._extra, None), self._replicas)
        if self._readers < self._replicas:
            refuse_other_losses(self)
        refuse_replicas(self.args, self._readers)

    # -- the engine ----------------------------------------------------------------------------------------------

    def _make_engine(self) -> DualPipeEngine:
        """The engine; built at the first use. Collective."""
        if self._engine is None:
            base = base_model(self.model)
            refuse_stages(base)
            with adapters_enabled(base), self._stage_randomness():
                self._engine = self._made_engine()
                hold_stages(base, self._engine)
            refuse_calls(self.model, self._engine)
        return self._engine

    def _made_engine(self) -> DualPipeEngine:
        dualpipe_engine_config = self._configuration()
        adapter = get_model_adapter(base_model(self.model), example_inputs=self._example)
        self._loss = self._batch_loss(adapter)
        module = on_stages(adapter, self._loss, self._stages, self._replicas)
        optimizer, groups = self._make_optimizer(module, dualpipe_engine_config)
        engine, *_ = dualpipe_engine.initialize(
            model=module,
            model_parameters=groups,
            optimizer=optimizer,
            config=dualpipe_engine_config,
        )
        made: DualPipeEngine = engine
        return made

    def _configuration(self) -> dict[str, Any]:
        args = self.args
        precision = {name: {"enabled": True} for name in ("bf16", "fp16") if self.accelerator.mixed_precision == name}
        extra = copy.deepcopy(self._extra)
        pipeline = {"schedule": self._schedule, **extra.pop("pipeline", {})}
        if read_section(extra.get(EXPERT_PARALLEL)) is not None:
            every = args.logging_steps  # below 1 a share of all steps
            pipeline = {"load_report_steps": int(every) if every >= 1 else 10} | pipeline
        return {
            "train_micro_batch_size_per_gpu": max(1, args.per_device_train_batch_size // self._num_chunks),
            "gradient_accumulation_steps": self._num_chunks,
            CLIPPING: args.max_grad_norm or 0.0,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
            **precision,
            **extra,
            "pipeline": pipeline,
        }

    def _batch_loss(self, adapter: ModelAdapter) -> TrainerLoss:
        try:
            own = adapter.own_loss
        except ConfigError as error:
            if self.compute_loss_func is None and type(self).compute_loss is Trainer.compute_loss:
                name = type(base_model(self.model)).__name__
                raise ConfigError(
                    f"the loss of {name} is not known: override compute_loss, or give a compute_loss_func"
                ) from error
            own = None
        weight, model = adapter.auxiliary_weight, base_model(self.model)
        if self._readers < self._replicas:
            assert own is not None  # a loss of the user's is refused
            return SharedLoss(self, model, own, weight)
        if weight is None:
            return TrainerLoss(self, model, own, self._stand_in)
        return RoutedLoss(self, model, own, weight, self._stand_in)

    def _stand_in(self, *given: Any) -> StandIn:
        return StandIn(*given)

    def _shifted(self) -> bool:
        """Whether labels are those of the tokens before; when a Trainer smooths, of `ForCausalLM` models only."""
        language = type(base_model(self.model)).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        return language or (self._loss_shifts_labels and self.label_smoother is None)

    def _make_optimizer(
        self, module: PipelineModule, configuration: dict[str, Any]
    ) -> tuple[Any, list[dict[str, Any]]]:
        """What makes the optimizer, and the groups of this rank's parameters: the user's optimizer, what an overridden
        `create_optimizer` makes, or the class that the arguments name."""
        low = any(configuration.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
        in_parts = low or configuration["zero_optimization"].get("stage", 0) > 0
        if self.optimizer is None and type(self).create_optimizer is not Trainer.create_optimizer:
            self.create_optimizer()
        if self.optimizer is not None:
            refuse_optimizer(type(self.optimizer).__name__, in_parts)
            refuse_left_out(self.optimizer, self.model)
            return rebuilt(self.optimizer, module)
        if self.optimizer_cls_and_kwargs is not None:
            kind, options = self.optimizer_cls_and_kwargs
        else:
            refuse_optimizer(str(getattr(self.args.optim, "value", self.args.optim)), in_parts)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        refuse_optimizer(kind.__name__, in_parts)
        return partial(kind, **options), self._parameter_groups(module)

    def _parameter_groups(self, module: PipelineModule) -> list[dict[str, Any]]:
        """The Trainer's groups, with and without weight decay, over this rank's layers."""
        decayed = set(self.get_decay_parameter_names(module))
        groups: list[dict[str, Any]] = [
            {"params": [], "weight_decay": self.args.weight_decay},
            {"params": [], "weight_decay": 0.0},
        ]
        for name, param in module.named_parameters():
            if param.requires_grad:
                groups[name not in decayed]["params"].append(param)
        return groups

    # -- what the Trainer's loop calls ---------------------------------------------------------------------------

    def _wrap_model(self, model: Model, training: bool = True, dataloader: DataLoader | None = None) -> Pipeline:
        self._make_engine()
        return Pipeline(self.model)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[Pipeline, DataLoader]:
        engine = self._make_engine()
        if self._created_lr_scheduler:
            self.lr_scheduler = None
        self.optimizer = OptimizerView(engine)
        if self.lr_scheduler is not None:
            self.lr_scheduler.optimizer = self.optimizer  # the user's, made for an optimizer of the whole model
        self.create_scheduler(num_training_steps=max_steps, optimizer=self.optimizer)
        self.model_wrapped = Pipeline(self.model)
        if resume_from_checkpoint is not None:
            self._load_engine(resume_from_checkpoint)
            self.lr_scheduler.load_state_dict(torch.load(Path(resume_from_checkpoint, SCHEDULER), weights_only=True))
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return self.model_wrapped, train_dataloader

    def training_step(
        self, model: Model, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        engine = self._make_engine()
        model.train()
        inputs = self._prepare_inputs(inputs)
        micros = self._micros(inputs, num_items_in_batch, self._readers)
        if engine.gradient_accumulation_steps() != len(micros):
            engine.set_train_batch_size(len(micros) * engine.train_micro_batch_size_per_gpu() * self._readers)
        if CLIPPING not in self._extra:
            clip_by_norm(engine, self.args.max_grad_norm)
        with self._one_batch(inputs), self._stage_randomness():
            loss: torch.Tensor = engine.train_batch(iter(micros))
        return loss.detach().clone().to(self.args.device)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor | int | None:
        """Labels that count, over the replicas: all ranks of a pipeline, and of those that share it, hold one batch."""
        with self._alone():
            items = super()._get_num_items_in_batch(batch_samples, device)
        if items is None or self._readers == 1:
            return items
        total = torch.as_tensor(items, dtype=torch.float64, device=device)
        dist.all_reduce(total, group=self._make_engine()._replica_group)
        return total * self._readers / self._replicas

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's; beside the loss stands how evenly experts were used in the step last reported.

        Raises:
            ConfigError: `compute_loss` logs, of a micro-batch and on the ranks of the last stage.
        """
        if self._is_alone:
            raise ConfigError(
                f"compute_loss logs {', '.join(logs)} of one micro-batch, on the ranks that run the last stage: return "
                "tensors with a row for each sample beside the loss, which compute_metrics gets in an evaluation"
            )
        report = None if self._engine is None else self._engine.expert_load
        if report is not None and "loss" in logs:
            logs = logs | report.values()
        super().log(logs, *args, **kwargs)

    def _clip_grad_norm(self, model: Model) -> float | None:
        return self._get_grad_norm(model)

    def _get_grad_norm(self, model: Model, grad_norm: float | None = None) -> float | None:
        """Of the step just taken, before clipping, which the engine has done."""
        found = self._make_engine().get_global_grad_norm()
        return None if found is None else float(found)

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """As the Trainer's.

        Raises:
            ConfigError: see `refuse_callback`.
        """
        refuse_callback(callback)
        super().add_callback(callback)

    def _main_input(self) -> str:
        return str(getattr(self.model, "main_input_name", "input_ids"))

    def floating_point_ops(self, inputs: Batch) -> int:
        """As the Trainer's, of the model as it was given: a rank gives back weights that train elsewhere."""
        main = inputs.get(self._main_input())
        return 0 if main is None else self._ops_of_one * main.numel()

    def store_flos(self) -> None:
        """As the Trainer's, which adds up all ranks; those of a pipeline have counted the same batches, and those that
        share them."""
        self.current_flos /= self._stages * self._replicas // self._readers
        super().store_flos()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let the Trainer, and its `compute_loss`, count for one process: the ranks that run the last stage are few."""
        averaging, gathers = self.args.average_tokens_across_devices, ("gather", "gather_for_metrics")
        self.args.average_tokens_across_devices, self._is_alone = False, True
        for name in gathers:
            setattr(self.accelerator, name, lambda value, *args, **kwargs: value)
        try:
            yield
        finally:
            self.args.average_tokens_across_devices, self._is_alone = averaging, False
            for name in gathers:
                delattr(self.accelerator, name)

    # -- saving and loading --------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Gather the stages and save the whole model, as `from_pretrained` loads it. Collective."""
        engine = self._make_engine()
        with masters(engine) if self._given == torch.float32 else nullcontext():
            state = whole_names(self.model, gather_state_dict(engine))
            if self.args.should_save:  # within: the configuration that is saved has the dtype of the parameters
                self._save(output_dir, state_dict=state)
        dist.barrier()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        engine = self._make_engine()
        with self._stage_randomness():
            engine.save_checkpoint(output_dir, tag=ENGINE_TAG)
        if self.args.save_total_limit or self.args.push_to_hub:  # older ones are deleted next, or this one is sent
            engine.wait_for_checkpoint()
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER))
        dist.barrier()

    def _finalize_training(self, *args: object, **kwargs: object) -> TrainOutput:
        """As the Trainer's, when the last checkpoint is on the disk."""
        self._make_engine().wait_for_checkpoint()
        return super()._finalize_training(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Model = None) -> None:
        """Nothing yet: weights come with the engine's state, once there is an engine."""
        refuse_folder(Path(resume_from_checkpoint), ENGINE_TAG)

    def _load_engine(self, folder: str) -> None:
        engine = self._make_engine()
        with self._stage_randomness():
            load_from(engine, Path(folder, ENGINE_TAG), self._resume_elsewhere, "resume_elsewhere=True")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As the Trainer's; where ranks have no file of their own, as the first one of those that read the same."""
        super()._load_rng_state(checkpoint)
        follow_first(self._make_engine())

    def _load_best_model(self) -> None:
        load_weights(self._make_engine(), Path(self.state.best_model_checkpoint, ENGINE_TAG))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the Trainer's."""
        if not self._profiling:
            return super().train(*args, **kwargs)
        from dualpipe_engine.utils import enable_profiling, get_profiler

        enable_profiling(log_dir=self.args.output_dir)
        result = super().train(*args, **kwargs)
        profiler = get_profiler()
        profiler.save_to_file(str(Path(self.args.output_dir, "dualpipe_profile.json")))
        profiler.print_summary()
        return result
