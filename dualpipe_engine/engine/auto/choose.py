""" "schedule": "auto": measure the job once, simulate every schedule with what was found, take the fastest."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.keep_in_fp32 import keep_in_fp32_pattern
from deepspeed.utils import logger
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import DataLoader, IterableDataset

from ...comm.from_all import from_all
from ...comm.nest import Nest
from ...errors import ConfigError
from ...schedule.jobs.under_memory import Asked, Fitted, under_memory
from ...schedule.orders.registry import placements_on
from ...schedule.placement import LINEAR, Placement
from ...schedule.plain_json import parse
from ...schedule.search.compare import best_of
from ...schedule.search.job_costs import Measurement
from ...schedule.search.layer_costs import LayerCosts
from ...schedule.timing.costs import CostModel, PerStage
from ..batches.shards import Shards
from ..config import BatchView
from ..given import Collate, Dataset, Settings
from ..placing.balance import of_all_layers
from ..placing.experts import numel_by_sharing
from ..placing.grid import Place
from ..placing.partition import layer_name
from ..placing.recomputed import recomputed_modules
from ..placing.sequences import Sharing
from ..placing.stages import set_activation_checkpointing
from ..placing.tiled import tiled
from ..section import DualPipeConfig
from .in_parts import in_parts
from .layer_probe import probe_layers
from .link_probe import reduction_seconds
from .stage_probe import probe_stages

DEFAULT_FILE = "dualpipe_costs.json"  #: in the working directory
LAYER_RUNS = 3  #: of each layer, after one that warms up


def job_costs(
    module: PipelineModule,
    settings: Settings,
    config: DualPipeConfig,
    num_micro: int,
    sharing: Sharing,
    training_data: Dataset | None = None,
    collate_fn: Collate | None = None,
) -> Measurement | None:
    """What is known of the job's costs: from the file of an earlier start, else measured now where the schedule is
    "auto". Collective over all ranks; every rank returns the same.

    Args:
        module: a PipelineModule as its constructor left it.
        settings: the DeepSpeed JSON.
        config: our part of it.
        num_micro: micro-batches of one pipeline per batch.
        sharing: with whom this rank shares its sequences.
        training_data: dataset whose first samples are used.
        collate_fn: makes a micro-batch of samples.

    Returns:
        The measurement; None for a fixed schedule without "costs".

    Raises:
        ConfigError: there is no fitting file and no way to measure, or the file cannot be read or written.
    """
    auto = config.schedule == "auto"
    if not auto and config.costs is None:
        return None
    path = Path(config.costs or DEFAULT_FILE)
    micro_size = _micro_size(settings, num_micro, sharing.readers(module._grid.data_parallel_size))
    job = _describe(module, settings, config, micro_size, sharing.size)
    stored = _stored(path)
    tries = auto and any(from_all(bool(_may_be_recomputed(module, settings, config))))
    if stored is not None:
        if config.recompute is True and stored.recomputed is not None:
            stored = replace(stored, costs=stored.recomputed, job={**stored.job, "recompute": "True"}, recomputed=None)
        changed = stored.differences(job)
        if tries and stored.recomputed is None:
            changed.append("recompute: not tried -> to be tried")
        if auto and training_data is not None and stored.of_layers is None and _may_be_cut(module, settings, config):
            changed.append("cuts: not tried -> to be tried")
        if not changed:
            return stored
        if not auto:
            raise ConfigError(f'{path} was measured on another job ({"; ".join(changed)}): run "schedule": "auto" once')
        if dist.get_rank() == 0:
            logger.info(f"{path} was measured on another job ({'; '.join(changed)}): measuring again")
    elif not auto:
        raise ConfigError(f'"costs": there is no file {path}; "schedule": "auto" measures and writes it')
    if training_data is None:
        raise ConfigError(
            f'"schedule": "auto" measures the model on its data: give initialize(training_data=...) for one start, '
            f"which keeps the result in {path}, or name a schedule"
        )
    next_batch = _micro_batches(training_data, micro_size, collate_fn)
    measured = _measure(module, settings, config, job, num_micro, sharing, next_batch)
    if dist.get_rank() == 0:
        measured.save(path)
        logger.info(f"measured costs are kept in {path}")
    return measured


def choose(
    config: DualPipeConfig, measured: Measurement, num_micro: int, may_offload: bool = True
) -> tuple[DualPipeConfig, list[Fitted]]:
    """The configuration with "auto" replaced by the schedule with the shortest simulated step, and all schedules;
    `best_of` gives the row that was taken, with its plan. Layers are cut so that it is fastest. Where memory does not
    suffice a schedule gets a cap on its activations, or has some of them in host memory or computed again. What the
    configuration says itself of these stays.

    Args:
        may_offload: activations may leave for host memory where the configuration does not say whether they shall.

    Raises:
        PlanError: no schedule fits.
    """
    said = "offload_activations" in config.model_fields_set or not may_offload
    rows = under_memory(
        measured,
        Asked(
            num_micro,
            fewer=config.offload_activations if said else None,
            may_recompute="recompute" not in config.model_fields_set,
            may_cut=config.partition_method is None,
            activation_cap=config.activation_cap,
            optimize=config.optimize,
            split_backward=config.split_backward is not False,
            stages_per_rank=config.stages_per_rank,
        ),
    )
    best = best_of(rows)
    assert isinstance(best, Fitted)
    chosen: dict[str, object] = {
        "schedule": best.schedule,
        "activation_cap": best.cap,
        "stages_per_rank": best.stages_per_rank,
        "partition_method": best.counts or config.partition_method,
        "offload_activations": best.fewer,
        "recompute": best.recompute or config.recompute,
    }
    return config.model_copy(update=chosen), rows


def print_choice(rows: list[Fitted], measured: Measurement, num_micro: int) -> None:
    """Say in tables what was taken, and why."""
    from ...viz.fitting import fitting_table, lower_bounds
    from ...viz.summary import comparison_table
    from ...viz.terminal import wide_console

    title = f"auto: {measured.ranks} ranks, {num_micro} micro-batches, seconds simulated with measured costs"
    console = wide_console()
    console.print(comparison_table(rows, lower_bounds(rows, measured), title))
    if any(row.tried for row in rows):
        console.print(fitting_table(rows, measured.memory_bytes))
    console.print(best_of(rows).reason, highlight=False)


def _measure(
    module: PipelineModule,
    settings: Settings,
    config: DualPipeConfig,
    job: dict[str, str],
    num_micro: int,
    sharing: Sharing,
    next_batch: Callable[[], Nest],
) -> Measurement:
    grid = module._grid
    ranks = grid.pipe_parallel_size
    place = Place(grid.topology(), Placement(LINEAR, ranks), module.global_rank)
    device = torch.device(get_accelerator().device_name(module.local_rank))
    if dist.get_rank() == 0:
        logger.info(f'"schedule": "auto" measures {ranks} stages on {device}')
    types = DeepSpeedConfig(settings, BatchView(sharing.readers(module._grid.data_parallel_size)))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.half}.get(job["precision"])
    _cast(module, types, dtype)
    set_activation_checkpointing(module, settings.get("pipeline", {}))
    overlap = config.overlap is not False
    probe = partial(
        probe_stages,
        module,
        place,
        next_batch,
        num_micro,
        device=device,
        split_backward=config.split_backward is not False,
        overlap=overlap,
        timeout_s=config.p2p_timeout_s,
        sums=_sums(types, dtype),
    )
    with tiled(module, config.tiled_loss, config.tiled_mlp), in_parts(module, sharing, overlap) as shards:
        probe = partial(probe, shards=shards)
        costs, recomputed = probe(recomputed=recomputed_modules(module, config.recompute)), None
        again = _may_be_recomputed(module, settings, config)
        if any(from_all(bool(again))):
            recomputed = _at_least(probe(recomputed=again), costs)
        layers = _of_layers(module, next_batch(), shards) if _may_be_cut(module, settings, config) else None
    trained = [param for param in module.parameters() if param.requires_grad]
    numel = sum(param.numel() for param in trained)
    dtype = trained[0].dtype if trained else torch.float32
    placements = placements_on(ranks, len(module._layer_specs))
    reduction = reduction_seconds(grid, place, numel, dtype, placements)
    state, memory = _memory(settings, place, trained, dtype, placements)
    return Measurement(costs, ranks, len(module._layer_specs), reduction, state, memory, job, recomputed, layers)


def _may_be_cut(module: PipelineModule, settings: Settings, config: DualPipeConfig) -> bool:
    """Whether other cuts are tried: the configuration names none, and of layers more is kept than their inputs."""
    return config.partition_method is None and not _interval(module, settings)


def _interval(module: PipelineModule, settings: Settings) -> int:
    """Layers that DeepSpeed computes again together; 0: none."""
    return (
        settings.get("pipeline", {}).get("activation_checkpoint_interval", 0) or module.activation_checkpoint_interval
    )


def _of_layers(module: PipelineModule, batch: Nest, shards: Shards | None) -> LayerCosts:
    """What single layers take. Collective over all ranks."""
    batch = batch if shards is None else shards.cut(batch[0], batch[1])
    seconds, kept = zip(*probe_layers(module, batch, LAYER_RUNS), strict=True)
    start = int(module.parts[module.stage_id])
    mine = {start + index: _params(module, start + index) for index in range(len(module.forward_funcs))}
    with_next = [bool(getattr(spec, "with_next", False)) for spec in module._layer_specs]
    bounds, params = map(int, module.parts), of_all_layers(module, mine)
    return LayerCosts(tuple(bounds), seconds, kept, tuple(params), tuple(with_next))


def _params(module: PipelineModule, layer: int) -> int:
    """Trained parameters of a layer, tied ones too."""
    spec = module._layer_specs[layer]
    part = module.tied_modules[spec.key] if isinstance(spec, TiedLayerSpec) else module._modules.get(str(layer))
    return 0 if part is None else sum(param.numel() for param in part.parameters() if param.requires_grad)


def _may_be_recomputed(module: PipelineModule, settings: Settings, config: DualPipeConfig) -> dict[str, nn.Module]:
    """What the layers of this rank list as `recomputed`, where the configuration leaves open whether it is computed
    again and nothing stands against it on any rank. Collective over all ranks."""
    if "recompute" in config.model_fields_set or _interval(module, settings):
        return {}
    layers = module.forward_funcs
    own = config.overlap is not False and any(hasattr(type(each), "overlapped_forward_backward") for each in layers)
    statistics = any(isinstance(part, _NormBase) for part in module.modules())
    of_ranks = from_all((any(getattr(layer, "recomputed", ()) for layer in layers), own or statistics))
    if not any(lists for lists, _ in of_ranks) or any(against for _, against in of_ranks):
        return {}
    try:
        return recomputed_modules(module, True)
    except ConfigError:  # on all ranks: a module that transfers is among them
        return {}


def _at_least(costs: CostModel, other: CostModel) -> CostModel:
    """The same, where no op of a stage takes less than in `other`."""

    def larger(one: PerStage, two: PerStage) -> PerStage:
        assert isinstance(one, tuple) and isinstance(two, tuple)
        return tuple(map(max, one, two))

    f, i, w = larger(costs.f, other.f), larger(costs.i, other.i), larger(costs.w, other.w)
    pair = None if costs.fb is None or other.fb is None else larger(costs.fb, other.fb)
    return replace(costs, f=f, i=i, w=w, fb=pair)


def _cast(module: PipelineModule, types: DeepSpeedConfig, dtype: torch.dtype | None) -> None:
    """Cast the module with DeepSpeed's own hands, as its engine does in any case, for a second time then: parameters,
    and buffers only where "data_types" asks for it."""
    if dtype is None:
        return
    buffers = None if types.buffer_dtype is None else DtypeEnum(types.buffer_dtype).value
    kept = keep_in_fp32_pattern(module, types.keep_in_fp32_modules, dtype)
    DeepSpeedEngine._cast_module_mixed_precision(SimpleNamespace(module=module), dtype, buffers, False, kept)


def _sums(types: DeepSpeedConfig, dtype: torch.dtype | None) -> torch.dtype | None:
    """Of what dtype DeepSpeed's optimizer will keep sums of gradients beside those of autograd; None: it will not."""
    given = types.grad_accum_dtype
    accumulated = dtype if given is None else DtypeEnum(given).value
    beside = accumulated != (dtype or torch.float32) or (dtype is torch.bfloat16 and types.zero_optimization_stage == 0)
    return accumulated if beside else None


def _memory(
    settings: Settings, place: Place, trained: Sequence[Tensor], dtype: torch.dtype, placements: Sequence[Placement]
) -> tuple[dict[str, int], int]:
    """For each placement the bytes that the fullest rank has yet to allocate for weights, gradients and Adam's state,
    and nine tenths of the bytes that are free on the fullest device. State that the configuration keeps on the host is
    not the device's, but where the device is the host; that of experts is divided by the copies of a share."""
    accelerator = get_accelerator()
    free, on_cpu = accelerator.available_memory(), accelerator.device_name() == "cpu"
    numel = numel_by_sharing(trained)
    stages = from_all((socket.gethostname(), place.pipeline, place.rank, numel))
    if on_cpu:  # the ranks of a host share it
        free //= sum(host == socket.gethostname() for host, *_ in stages)
    of_stages = [each for _, each in sorted((rank, each) for _, line, rank, each in stages if line == place.pipeline)]
    zero = settings.get("zero_optimization", {})
    partitioned = zero.get("stage", 0) > 0
    on_host = not on_cpu and _on_host(zero)
    low = dtype.itemsize < 4

    def bytes_of(placement: Placement) -> int:
        total = 0
        for sharing in {each for stage in of_stages for each in stage}:
            held = placement.held([stage.get(sharing, 0) for stage in of_stages], place.rank)
            copies = placement.num_directions * place.replicas // sharing
            total += max(0, held - numel.get(sharing, 0)) * dtype.itemsize
            total += held * (4 + (dtype.itemsize if low else 0))
            if not on_host:
                total += held * (8 + (4 if low else 0)) // (copies if partitioned else 1)
        return total

    states = {placement.key: bytes_of(placement) for placement in placements}
    of_ranks = from_all((states, free))
    most = {name: max(each[name] for each, _ in of_ranks) for name in states}
    return most, min(room for _, room in of_ranks) * 9 // 10


def _on_host(zero: Settings) -> bool:
    """Whether the optimizer's state is to be in host memory."""
    device = (zero.get("offload_optimizer") or {}).get("device")
    return zero.get("stage", 0) > 0 and (bool(zero.get("cpu_offload")) or device == "cpu")


def _micro_size(settings: Settings, num_micro: int, readers: int) -> int:
    """Samples of a micro-batch."""
    size = settings.get("train_micro_batch_size_per_gpu")
    return size if isinstance(size, int) else settings["train_batch_size"] // (num_micro * readers)


def _describe(
    module: PipelineModule, settings: Settings, config: DualPipeConfig, micro_size: int, sharing: int
) -> dict[str, str]:
    """What the costs depend on, in words."""
    shapes = from_all([(name, tuple(p.shape), p.requires_grad) for name, p in module.named_parameters()])
    layers = [layer_name(layer) for layer in module._layer_specs]
    digest = hashlib.sha256(repr((layers, [int(part) for part in module.parts], shapes)).encode()).hexdigest()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else get_accelerator().device_name()
    zero = settings.get("zero_optimization", {})
    on = [name for name in ("bf16", "fp16") if settings.get(name, {}).get("enabled")]
    return {
        "model": digest[:16],
        "ranks": str(module._grid.pipe_parallel_size),
        "replicas": str(module._grid.data_parallel_size),
        **({"replicas that share each sequence": str(sharing)} if sharing > 1 else {}),
        "micro-batch size": str(micro_size),
        "precision": on[0] if on else "fp32",
        "zero stage": str(zero.get("stage", 0)),
        **({"optimizer state": "on the host"} if _on_host(zero) else {}),
        "activation checkpoint interval": str(_interval(module, settings)),
        **({"recompute": str(config.recompute)} if config.recompute else {}),
        **{name: str(tiles) for name in ("tiled_loss", "tiled_mlp") if (tiles := getattr(config, name))},
        "split_backward": str(config.split_backward),
        "overlap": str(config.overlap),
        "device": device,
        "torch": torch.__version__,
    }


def _stored(path: Path) -> Measurement | None:
    """The file as rank 0 sees it, on every rank; None if there is none."""
    box: list[Any] = [None]
    if dist.get_rank() == 0 and path.exists():
        try:
            box[0] = Measurement.load(path).to_json()
        except ConfigError as error:
            box[0] = error
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], ConfigError):
        raise box[0]
    return None if box[0] is None else Measurement.from_dict(parse(box[0]), str(path))


def _micro_batches(dataset: Dataset, size: int, collate_fn: Collate | None) -> Callable[[], Nest]:
    """Reads the first micro-batches of a dataset, again and again."""
    if not isinstance(dataset, IterableDataset) and len(dataset) < size:
        raise ConfigError(f"the training data holds {len(dataset)} samples, less than a micro-batch of {size}")

    def endless() -> Iterator[Nest]:
        while True:
            yield from DataLoader(dataset, batch_size=size, collate_fn=collate_fn, drop_last=True)

    return endless().__next__
