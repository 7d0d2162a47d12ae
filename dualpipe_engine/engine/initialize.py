"""`dualpipe_engine.initialize`: DeepSpeed's initialize, with our engine where the configuration names a schedule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
from deepspeed import comm as ds_comm
from deepspeed import zero
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from deepspeed.pipe import DualPipeVModule, PipelineModule
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine

from ..comm.communicators import noting_groups
from ..errors import ConfigError, DualPipeError, raised_everywhere
from ..faults.watch import Watch
from ..models.autoep import section as expert_parallel
from ..schedule.jobs.under_memory import Fitted
from ..schedule.orders.registry import STOCK
from ..schedule.plan import Plan
from ..schedule.progress import Position
from ..schedule.search.compare import best_of
from ..schedule.timing.costs import CostModel
from .auto.choose import choose, job_costs, print_choice
from .batches.shards import shard_batches
from .checks.agreement import agree_on_copies, agree_on_job, agree_on_schedule
from .checks.optimizers import check_optimizer
from .checks.written_buffers import check_statistics
from .config import find_config, micro_batches, read_by_deepspeed, read_config
from .engine import DualPipeEngine
from .given import Collate, Dataset, Loader, Optimizer, ParamEntry, Scheduler, Settings
from .load_report import check_load_report
from .placing.balance import stage_bounds
from .placing.exchanges import overlap_exchanges
from .placing.experts import make_expert_groups, stand_in_for_experts
from .placing.grid import Place, groups_of, set_device
from .placing.module import PlacedModule, place
from .placing.param_groups import GroupMap, check_dtypes, name_parameters
from .placing.recomputed import recomputed_modules
from .placing.sequences import Sharing, make_sharing, read_sizes, readers_of, share_sequences
from .placing.shared_blocks import check_blocks, connect_blocks, overlap_blocks, read_rest, share_blocks
from .placing.shared_weights import check_shared_weights
from .placing.stages import hooked_layers, set_activation_checkpointing
from .placing.tiled import tile
from .placing.views import refuse_own_forward
from .plan import StageCosts, agree, costs_of_stages, lowered_plan, make_lowered_plan
from .section import AUTO, DualPipeConfig

_stock_initialize = deepspeed.initialize  # before `dualpipe_engine.run` puts ours in its place


def initialize(
    args: object = None,
    model: torch.nn.Module | None = None,
    optimizer: Optimizer = None,
    model_parameters: Iterable[ParamEntry] | None = None,
    training_data: Dataset | None = None,
    lr_scheduler: Scheduler = None,
    distributed_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT,
    mpu: object = None,
    dist_init_required: bool | None = None,
    collate_fn: Collate | None = None,
    config: object = None,
    mesh_param: object = None,
    config_params: object = None,
    engine_class: type[PipelineEngine] | None = None,
) -> tuple[DeepSpeedEngine, Optimizer, Loader, Scheduler]:
    """Initialize DeepSpeed; takes and returns what `deepspeed.initialize` does.

    With a `"schedule"` in the "pipeline" section of the configuration, `model` (a `deepspeed.pipe.PipelineModule`) is
    placed on the ranks as the schedule demands and a `DualPipeEngine` runs it. Without one, DeepSpeed's own
    initialize is called unchanged.

    Args:
        engine_class: with a schedule, a subclass of DeepSpeed's PipelineEngine whose methods the engine shall have;
            they reach ours by `super()`.

    Returns:
        (engine, optimizer, training data loader, learning rate scheduler).

    Raises:
        ConfigError: the configuration cannot work; raised on every rank before memory is allocated.
        PlanError: the schedule cannot run on these ranks; likewise.
    """
    given: dict[str, Any] = {
        "args": args,
        "model": model,
        "optimizer": optimizer,
        "model_parameters": model_parameters,
        "training_data": training_data,
        "lr_scheduler": lr_scheduler,
        "distributed_port": distributed_port,
        "mpu": mpu,
        "dist_init_required": dist_init_required,
        "collate_fn": collate_fn,
        "mesh_param": mesh_param,
    }
    settings, dualpipe, error = _read(find_config(args, config, config_params), model, mpu, mesh_param)
    watch = None
    if isinstance(model, PipelineModule) and ds_comm.is_initialized():  # all ranks of the job have made one
        watch = _watched_from_here(model, dualpipe, error, distributed_port, dist_init_required)
    elif error is not None:
        raise error
    if not dualpipe.is_stock:
        assert watch is not None
        return _under_schedule(settings, dualpipe, engine_class, watch, **given)
    if watch is not None:
        watch.close()
    return _stock_initialize(**given, config=config, config_params=config_params)


def _under_schedule(
    settings: Settings,
    dualpipe: DualPipeConfig,
    engine_class: type[PipelineEngine] | None,
    watch: Watch,
    *,
    model: PipelineModule,
    optimizer: Optimizer,
    model_parameters: Iterable[ParamEntry] | None,
    training_data: Dataset | None,
    lr_scheduler: Scheduler,
    dist_init_required: bool | None,
    collate_fn: Collate | None,
    args: object,
    **_: object,
) -> tuple[DeepSpeedEngine, Optimizer, Loader, Scheduler]:
    """`initialize` with a schedule; see there."""
    zero.partition_parameters.shutdown_init_context()
    given_groups = groups_of(model)
    with watch.section("initialize"), noting_groups() as made_groups:
        agree_on_job(settings, model)
        readers = readers_of(settings, model._grid.data_parallel_size)
        with raised_everywhere():
            config_class = read_by_deepspeed(settings, readers)
        given = None if model_parameters is None else list(model_parameters)  # of the module as it is now
        name_parameters(model)
        if (shared := expert_parallel.read_section(settings.get(expert_parallel.NAME))) is not None:
            check_blocks(model, shared)
            share_blocks(model, shared)
        read_rest(model)
        base_grid = model._grid
        sharing = make_sharing(base_grid, base_grid.data_parallel_size // readers)
        dualpipe, plan, costs = _choose_plan(model, settings, dualpipe, sharing, training_data, collate_fn)
        placed = _place(model, settings, dualpipe, plan, costs(plan.placement))
        sharing = share_sequences(model, sharing)
        if sharing.size > 1 and dualpipe.overlap is not False:
            model.dualpipe_waits = overlap_exchanges(model, base_grid.dp_proc_group)
        shards = shard_batches(model, sharing)
        model.dualpipe_recomputed = recomputed_modules(model, dualpipe.recompute)
        check_statistics(model, plan.placement, model.dualpipe_recomputed)
        groups = GroupMap(model, given, optimizer, base_grid.pp_proc_group, lr_scheduler)
        optimizer, given = groups.apply()
        check_dtypes(model, optimizer, given, config_class)
        check_optimizer(model, optimizer, config_class)
        deepspeed.set_optimizer_flags(config_class, model)
        engine = _with_methods_of(engine_class)(
            dualpipe=dualpipe,
            base_grid=base_grid,
            place=placed,
            plan=plan,
            costs=costs,
            watch=watch,
            sharing=sharing,
            shards=shards,
            args=args,
            model=model,
            optimizer=optimizer,
            model_parameters=given,
            training_data=training_data,
            lr_scheduler=lr_scheduler,
            mpu=model.mpu(),
            dist_init_required=dist_init_required,
            collate_fn=collate_fn,
            config=settings,
            config_class=config_class,
        )
        zero.partition_parameters.restore_init_context()
        engine._configure_python_gc()
    engine.own_groups = [*given_groups, *made_groups]
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _choose_plan(
    model: PipelineModule,
    settings: Settings,
    dualpipe: DualPipeConfig,
    sharing: Sharing,
    training_data: Dataset | None,
    collate_fn: Collate | None,
) -> tuple[DualPipeConfig, Plan, StageCosts]:
    """The configuration with "auto" replaced, the lowered plan, and the costs of stages. Collective."""
    grid = model._grid
    with raised_everywhere():
        num_micro = micro_batches(settings, sharing.readers(grid.data_parallel_size))
    measured = job_costs(model, settings, dualpipe, num_micro, sharing, training_data, collate_fn)
    if dualpipe.schedule == AUTO:
        assert measured is not None
        # DeepSpeed keeps the inputs of layers that it checkpoints by itself.
        interval = settings.get("pipeline", {}).get("activation_checkpoint_interval", 0)
        may_offload = not (interval or model.activation_checkpoint_interval)
        dualpipe, rows = choose(dualpipe, measured, num_micro, may_offload)
        if ds_comm.get_rank() == 0:
            print_choice(rows, measured, num_micro)
        best = best_of(rows)
        assert isinstance(best, Fitted) and best.plan is not None
        costs = costs_of_stages(model, dualpipe, measured.again(best.recompute))
        plan = lowered_plan(best.plan, dualpipe, costs(best.plan.placement))
    else:
        costs = costs_of_stages(model, dualpipe, measured)
        with raised_everywhere():
            plan = make_lowered_plan(dualpipe, grid.pipe_parallel_size, num_micro, costs, exact=True)
    agree(plan, torch.device(get_accelerator().current_device_name()))
    return dualpipe, plan, costs


def _place(model: PipelineModule, settings: Settings, dualpipe: DualPipeConfig, plan: Plan, costs: CostModel) -> Place:
    """Convert the module into the stages of this rank, and check them. Collective."""
    base_grid = model._grid
    bounds = stage_bounds(model, plan, dualpipe, costs)
    check_shared_weights(model, bounds)
    placed = place(model, plan.placement, bounds)
    model.dualpipe_counts = check_load_report(model, dualpipe)
    make_expert_groups(model, base_grid)
    stand_in_for_experts(model)
    agree_on_copies(model, model.dualpipe_layers, placed.replica)
    if expert_parallel.read_section(settings.get(expert_parallel.NAME)) is not None:
        connect_blocks(model)
        model.dualpipe_unphased = overlap_blocks(model) if dualpipe.overlap is not False else {}
    if dualpipe.overlap is not False:
        model.dualpipe_unphased |= hooked_layers(model)
    set_activation_checkpointing(model, settings.get("pipeline", {}))
    tile(model, dualpipe.tiled_loss, dualpipe.tiled_mlp)
    return placed


def _read(
    found: object, model: torch.nn.Module | None, mpu: object, mesh_param: object
) -> tuple[Settings, DualPipeConfig, DualPipeError | None]:
    """The whole configuration, our part of it, and what is wrong with it or with the other arguments."""
    settings: Settings = {}
    dualpipe = DualPipeConfig()
    try:
        if found is not None:
            settings, dualpipe = read_config(found)
        if not dualpipe.is_stock:
            _check_arguments(dualpipe.schedule, model, mpu)
            settings = read_sizes(settings, mesh_param)
    except DualPipeError as error:
        return settings, dualpipe, error
    return settings, dualpipe, None


def _check_arguments(schedule: str, model: torch.nn.Module | None, mpu: object) -> None:
    if not isinstance(model, PipelineModule):
        raise ConfigError(
            f'"schedule": "{schedule}" needs a deepspeed.pipe.PipelineModule, got {type(model).__name__}: '
            "list the model's layers as LayerSpecs"
        )
    if isinstance(model, PlacedModule):
        raise ConfigError(
            "this PipelineModule holds the stages of an engine that was made of it: make one anew, which may have the "
            "same layers once that engine is destroyed"
        )
    if isinstance(model, DualPipeVModule):
        raise ConfigError(
            f'"schedule": "{schedule}" and a DualPipeVModule, which has DeepSpeed\'s own schedule, do not go '
            "together: make it a PipelineModule, or leave the schedule out"
        )
    refuse_own_forward(model)
    if mpu is not None:
        raise ConfigError("mpu must be None: the PipelineModule's topology says where ranks stand")


def _watched_from_here(
    model: PipelineModule, dualpipe: DualPipeConfig, error: DualPipeError | None, port: int, required: bool | None
) -> Watch:
    """The watch over all ranks, which have read the same schedule. Collective over all ranks."""
    ds_comm.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(),
        distributed_port=port,
        dist_init_required=required,
    )
    set_device(model)
    watch = Watch(dualpipe.p2p_timeout_s, Position())
    try:
        with watch.section("initialize"):
            agree_on_schedule(error, dualpipe.schedule)
    except DualPipeError:
        watch.close()
        raise
    return watch


def _with_methods_of(engine_class: type[PipelineEngine] | None) -> type[DualPipeEngine]:
    if engine_class is None or issubclass(DualPipeEngine, engine_class):
        return DualPipeEngine
    if issubclass(engine_class, DualPipeEngine):
        return engine_class
    return type(engine_class.__name__, (engine_class, DualPipeEngine), {"__module__": engine_class.__module__})


def refuse_other_engines() -> None:
    """Let DeepSpeed's own PipelineEngine refuse a configuration with a schedule of ours, which it would ignore."""
    original = PipelineEngine.__init__

    def init(self: PipelineEngine, *args: object, **kwargs: object) -> None:
        schedule = getattr(kwargs.get("config_class"), "pipeline", {}).get("schedule", STOCK)
        if schedule != STOCK:
            raise ConfigError(
                f'{type(self).__name__} would ignore "schedule": "{schedule}": call '
                f"dualpipe_engine.initialize(engine_class={type(self).__name__}, ...) instead of making it"
            )
        original(self, *args, **kwargs)

    PipelineEngine.__init__ = init
