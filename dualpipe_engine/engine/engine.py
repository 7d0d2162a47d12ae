"""DualPipeEngine: DeepSpeed's pipeline engine with a plan in place of its instruction schedule."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from deepspeed.runtime.torch_autocast import autocast_if_enabled
from deepspeed.utils import logger

from ..comm.communicators import matches_by_tag
from ..comm.device import side_stream
from ..comm.nest import Nest
from ..comm.p2p import Edges
from ..comm.queues import VARIABLE, check_queues
from ..comm.stream import StreamTicket
from ..comm.tickets import Transfer
from ..comm.transports import transport_of
from ..errors import ConfigError, raised_everywhere
from ..faults.watch import Watch
from ..faults.watched import watched
from ..runtime.apex_support import apex_status
from ..runtime.executor import Executor
from ..runtime.observer import Observer
from ..runtime.offload import Offload
from ..runtime.recompute import Recompute
from ..runtime.weight_grad import DeferredWeightGrads
from ..schedule.op import I, atoms
from ..schedule.plan import Plan
from ..schedule.progress import waiting
from ..schedule.records import LOSS
from .batches.additional_losses import AdditionalLosses
from .batches.evaluation import Evaluation
from .batches.feed import BatchFeed
from .batches.loader import Loading
from .batches.loss_sums import Totals
from .batches.shards import Shards
from .batches.steps import WHOLE, PartOfStep, StepsApart
from .checkpoint.save_load import Checkpoints
from .checks.agreement import refused_everywhere
from .checks.finite import FiniteCheck
from .checks.token_mixing import TokenMixing
from .checks.written_buffers import WrittenBuffers
from .context import Context, Groups, Steps
from .given import Settings
from .life_cycle import LifeCycle
from .load_report import LoadReporter
from .placing.experts import has_experts
from .placing.grid import Place
from .placing.module import PlacedModule
from .placing.sequences import Sharing
from .placing.shared_blocks import SharingExperts
from .placing.stages import has_phases, reads_micro_offset
from .placing.views import stage_views
from .plan import StageCosts, make_lowered_plan
from .reduction.after_schedule import AfterSchedule
from .reduction.averaging import Averaging
from .reduction.freezing import TrainedParams
from .reduction.masters import Masters
from .reduction.optimizers import Optimizers
from .reduction.tail import GradientTail
from .reporting import Reporting
from .section import DualPipeConfig
from .surface import Surface
from .timelines import Measuring


class DualPipeEngine(
    LifeCycle,
    Averaging,
    Optimizers,
    StepsApart,
    Evaluation,
    Measuring,
    Reporting,
    Checkpoints,
    Loading,
    SharingExperts,
    Surface,
):
    """What `dualpipe_engine.initialize` returns.

    `train_batch`, `eval_batch`, `save_checkpoint`, `load_checkpoint` and the rest of DeepSpeed's PipelineEngine keep
    their meaning; `gradient_accumulation_steps()` is the number of micro-batches of one pipeline.

    Args:
        dualpipe: our part of the configuration.
        base_grid: the grid that the PipelineModule was built on, with all pipeline ranks.
        place: this rank's place in its pipeline.
        plan: the lowered training plan.
        costs: of the stages of a placement, for plans of other batch sizes.
        watch: ends the job when a rank is lost.
        sharing: with whom this rank shares its sequences.
        shards: cuts its micro-batches, if it does.
        deepspeed: arguments of DeepSpeedEngine.

    Attributes:
        place: stages, pipeline rank and replica of this process.
        finite: reports NaN and inf.
    """

    def __init__(
        self,
        *,
        dualpipe: DualPipeConfig,
        base_grid: PipelineParallelGrid,
        place: Place,
        plan: Plan,
        costs: StageCosts,
        watch: Watch,
        sharing: Sharing,
        shards: Shards | None,
        **deepspeed: object,
    ) -> None:
        self.dualpipe_config, self.place, self.sharing, self._shards = dualpipe, place, sharing, shards
        self.masters = Masters()
        self._init_saving()
        # DeepSpeed's own pipeline set-up (buffers, blocking p2p, ZeRO assertion) does not apply, hence not super().
        DeepSpeedEngine.__init__(self, **deepspeed)
        self._costs = costs
        self.watch = watch
        watch.position.pipeline = place.pipeline
        self._pipeline_group = base_grid.pp_proc_group
        self._replica_group = base_grid.dp_proc_group
        groups = self._pipeline_group, self._replica_group, self.module._grid.slice_proc_group
        self.totals = Totals(groups, self.device, self.signals_here)
        self._init_pipeline_state(base_grid)
        self._context = self._make_context(plan)
        self._load_reporter = LoadReporter(self._context, self._pipeline_group)
        self._init_executor()
        # They have transfers of their own, or DeepSpeed's reduction asks which gradients there are.
        bound = has_experts(self.module) or has_phases(self.module) or self.is_model_parallel or sharing.size > 1
        self._init_recovery(bound or isinstance(self._tail.reduction, AfterSchedule))
        if self.training_data:
            self._build_data_iter(self.training_data)

    def _broadcast_model(self) -> None:
        """DeepSpeed sends parameters as bytes, which one without dimensions cannot be viewed as."""
        numbers = {param: param.data for param in self.module.parameters() if param.dim() == 0}
        for param, number in numbers.items():
            param.data = number.view(1)
        super()._broadcast_model()
        for param, number in numbers.items():
            param.data = number

    def _make_context(self, plan: Plan) -> Context:
        return Context(
            module=self.module,
            views=stage_views(self.module),
            place=self.place,
            plan=plan,
            device=self.device,
            groups=Groups(self.mpu.get_data_parallel_group(), self.mpu.get_model_parallel_group()),
            first_slice=self.mpu.get_tensor_model_parallel_rank() == 0,
            observer=Observer(self.place.rank, self.device),
            totals=self.totals,
            scaling=self._scaling(),
            partitions_gradients=self.zero_optimization_partition_gradients(),
            steps=Steps(self._reduce_all, lambda: self._exec_optimizer_step(), lambda: self.global_steps),
            optimizer=self.optimizer,
            load_report_steps=self._load_report_steps(),
        )

    def _reduce_all(self) -> None:
        self._exec_reduce_tied_grads()
        self._exec_reduce_grads()

    @property
    def plan(self) -> Plan:
        """The lowered training plan."""
        return self._context.plan

    def _init_executor(self) -> None:
        module: PlacedModule = self.module
        context = self._context
        self._store = None
        if any(part.kind == I for op in self.plan.programs[self.place.rank] for part in atoms(op)):
            apex = apex_status()
            if self.global_rank == 0 and apex.message:
                logger.info(apex.message)
            self._store = DeferredWeightGrads(apex.wgrad if self.device.type == "cuda" else None)
        self._recompute = Recompute(module.dualpipe_recomputed) if module.dualpipe_recomputed else None
        self._install()
        self._transfers: list[Transfer] = []  # of the last batch, within phases and to and from host memory
        timeout = self.dualpipe_config.p2p_timeout_s
        offloads = self.dualpipe_config.offload_activations or self.plan.has_copies()
        self._offload = Offload(module, self.device, timeout, self._transfers) if offloads else None
        self._additional = AdditionalLosses(module, self._pipeline_group, self._replica_group)
        with refused_everywhere():
            self._make_chunks()
        self._transported: list[StreamTicket] = []  # of the last batch, between stages
        if not matches_by_tag(self._pipeline_group):
            check_queues(self.plan, module.dynamic_shape, self.device, os.environ.get(VARIABLE))
        with waiting():  # it connects the ends of its edges
            self._transport = transport = transport_of(self._pipeline_group)(
                self.place.pipeline,
                self.place.rank,
                self._pipeline_group,
                self.device,
                self._transported,
                edges=self.place.placement.edges(),
                timeout_s=timeout,
            )
        self._edges = Edges(transport, self.device, timeout, module.dynamic_shape, self.watch.position)
        self._observer = context.observer
        self._trained = TrainedParams(context)
        placement, replicas = self.place.placement, self.place.replicas
        self._mixing = TokenMixing(self.sharing.size > 1)
        self._written = WrittenBuffers(module, placement, self._pipeline_group, replicas)
        self.finite = self._make_finite_check()
        self._tail = GradientTail(context, self._trained, self.finite, self.watch)
        on_micro = self._before_forward if reads_micro_offset(module) else None
        self._executor = Executor(
            self.place.rank,
            self._chunks,
            self._edges,
            self._observer,
            self._tail,
            on_micro,
            self.finite.borders,
            self.watch,
            self._offload,
        )
        self._inbound = side_stream(self.device)  # of inputs and labels
        # Evaluation may use other shapes, so it has edges of its own and announces every shape.
        self._eval_executor = Executor(
            self.place.rank,
            self._chunks,
            Edges(transport, self.device, timeout, True, self.watch.position),
            Observer(self.place.rank, self.device),
            on_micro=on_micro,
            failing=self.watch,
        )

    def _make_finite_check(self) -> FiniteCheck:
        watched = None
        if self.dualpipe_config.check_finite:
            by_stage = self._context.params_of_stages()
            params = list(self.module.parameters())
            watched = {stage: [param for param in params if param in of_stage] for stage, of_stage in by_stage.items()}
        scaled = self.fp16_enabled() or self.torch_autocast_z0_gradscaler is not None
        place, totals = self.place, self.totals
        return FiniteCheck(
            watched, scaled, self.global_rank, place.replica, place.replicas, lambda: totals.finish().bad
        )

    # -- training ------------------------------------------------------------------------------------------------

    @watched
    def train_batch(self, data_iter: Iterator[Nest] | None = None) -> torch.Tensor:
        """Train on one batch of `train_batch_size()` samples and step the optimizer.

        Args:
            data_iter: yields `gradient_accumulation_steps()` pairs (inputs, labels) of one micro-batch each; both ends
                of a bidirectional pipeline must be given the same stream. None reads the training data of `initialize`.

        Returns:
            The mean loss over all micro-batches and replicas, the same number on every rank (scalar tensor).

        Raises:
            RuntimeError: gradients are switched off.
            ConfigError: no optimizer is configured, there is no data, the ends of the pipeline read different data, or
                `requires_grad` was changed where it cannot be followed.
            StopIteration: the data ended within the batch.
            Exception: what a layer, the loss, a hook or the data have raised. All ranks raise it, or on the others an
                error that names it, and can go on with another batch; not where layers have transfers of their own
                (experts, tensor parallelism, phases), where the job ends.
            PipelineRuntimeError: a rank was lost, a transfer failed, copies of a parameter differ, or `check_finite`
                has found a NaN or an inf.
            CheckpointError: a checkpoint could not be written in the background; the next call trains.
            SystemExit: the signal of "save_on_signal" has come, and the checkpoint is saved.
        """
        with self._attempt():
            loss = self._run_batch(data_iter, WHOLE)
            self._after_step()
        self._end_on_signal()
        return loss

    def _run_batch(self, data_iter: Iterator[Nest] | None, part: PartOfStep) -> torch.Tensor:
        self._check_save_folder()
        self._follow_save()
        self._agree_on_plan()
        feed = self._begin_batch(data_iter, part)
        with autocast_if_enabled(self), self._mixing.watched(train=True):
            self._executor.run(self.plan, feed)
        self.module.micro_offset += self.micro_batches
        if not self._checked_stream:
            self._check_stream(feed)
            self._report_split()
        with self._observer.waiting(LOSS):
            self.agg_train_loss, self.dp_group_loss, *_ = self.totals.finish()
            self.agg_additional_losses = self._additional.mean(self.micro_batches, self.device)
        self._keep_record()
        self.timers(TRAIN_BATCH_TIMER).stop()
        self._trained.check()
        return self.agg_train_loss

    def _begin_batch(self, data_iter: Iterator[Nest] | None, part: PartOfStep) -> BatchFeed:
        """The data of a batch. An error here is one of the batch: all ranks raise it when they have come to its end."""
        feed = self._no_feed()
        try:
            self._check_part(part)
            if not torch.is_grad_enabled():
                raise RuntimeError("train_batch() needs gradients; use eval_batch() without")
            if self.optimizer is None or not getattr(self.optimizer, "using_real_optimizer", True):
                raise ConfigError('train_batch() needs an optimizer: add "optimizer" to the DeepSpeed configuration')
            if data_iter is not None:
                self.set_dataiterator(data_iter)
            self._follow_module()
            if self._trained.changed():
                self._check_unchanged()
                self._install()
            self._written.begin()
            feed = self._feed(self.micro_batches, fingerprint=not self._checked_stream)
        except Exception as error:
            self.watch.fail_batch(error, "train_batch")
        self.module.train()
        self.timers(TRAIN_BATCH_TIMER).start()
        self._tail.begin(feed.drain, part)
        self._transfers.clear()
        self._transported.clear()
        self._additional.begin()
        self._executor.scale = self._loss_factor() / part.batches
        return feed

    def _exec_optimizer_step(self, lr_kwargs: Settings | None = None) -> None:
        self._mixing.check(train=True)
        self._written.check()
        super()._exec_optimizer_step(lr_kwargs)

    def _agree_on_plan(self) -> None:
        """Make a new plan when the number of micro-batches has changed (`set_train_batch_size`)."""
        if self.plan.num_micro != self.micro_batches:
            num_ranks = self.plan.placement.num_ranks
            with raised_everywhere():
                plan = make_lowered_plan(self.dualpipe_config, num_ranks, self.micro_batches, self._costs)
            self._context.plan = plan

    def reset_activation_shape(self) -> None:
        """Let the next batch bring new shapes; call it on every rank."""
        self._edges.reset_shapes()

    def clip_fp32_gradients(self) -> None:
        """Clip by the norm over all stages, every parameter counted once."""
        self._global_grad_norm = self._tail.clip(self.gradient_clipping())

    save_checkpoint = watched(Checkpoints.save_checkpoint)
    load_checkpoint = watched(Checkpoints.load_checkpoint)
    wait_for_checkpoint = watched(Checkpoints.wait_for_checkpoint)

    @property
    def weight_grad_store(self) -> DeferredWeightGrads | None:
        """Takes weight gradients that user layers defer (`put` while `deferring`); None if the plan has no W."""
        return self._store
