"""What becomes of each key of DeepSpeed's configuration under a schedule.

`refuse_keys` raises for what cannot work and `refuse_misspelt` for what nothing would read, and `python docs/tables.py`
writes all rows into docs/configuration.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from enum import Enum
from typing import NamedTuple

from ..errors import ConfigError
from ..models.autoep.section import REFUSED
from .given import Settings


class Status(Enum):
    WORKS = "works"
    IDLE = "stock does nothing either"
    REFUSED = "refused"


class KeyRow(NamedTuple):
    """Keys of one fate.

    Args:
        status: which.
        section: what stands before the keys, with dots.
        keys: the keys; one that ends in `.*` stands for all below it that no other row has.
        why: the reason, or what the keys do here.
        test: where it is tested, relative to tests/.
        off: values that ask for nothing, of keys that are refused here; None where others refuse them.
    """

    status: Status
    section: str
    keys: tuple[str, ...]
    why: str = ""
    test: str = ""
    off: tuple[object, ...] | None = None

    @property
    def paths(self) -> list[str]:
        return [f"{self.section}.{key}" if self.section else key for key in self.keys]


def _works(keys: str, test: str, why: str = "", section: str = "") -> KeyRow:
    return KeyRow(Status.WORKS, section, tuple(keys.split()), why, test)


def _idle(keys: str, why: str, section: str = "") -> KeyRow:
    return KeyRow(Status.IDLE, section, tuple(keys.split()), why)


def _refused(keys: str, why: str, off: tuple[object, ...] = (False,), section: str = "") -> KeyRow:
    return KeyRow(Status.REFUSED, section, tuple(keys.split()), why, "engine/test_keys.py::test_refused", off)


_PARITY = "engine/test_parity.py::test_trains_like_stock"
_SAME = "engine/test_keys.py::test_keys_that_do_not_change_the_training"
_SAVED = "engine/test_keys.py::test_checkpoints_with_other_keys"
_WRITTEN = "engine/test_keys.py::test_what_is_written_and_read"
_BF16 = "engine/test_keys.py::test_keys_of_bf16"
_REPORTS = "engine/test_reporting.py::test_reports_like_stock"
_SENTENCE = "engine/test_errors.py::test_every_rank_says_the_same_sentence"
_OFFLOAD = "engine/reduction/test_partitioned.py::test_optimizer_on_the_host_trains_like_stock"
_ZERO_3 = "only ZeRO-3 reads it"
_GONE = "DeepSpeed has removed it"

TRAINING = (
    _works("train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping", _PARITY),
    _works(
        "prescale_gradients gradient_predivide_factor gradient_allreduce_op communication_data_type",
        "engine/test_keys.py::test_how_gradients_are_reduced",
    ),
    _idle(
        "activation_checkpointing activation_checkpointing.*",
        "read by deepspeed.checkpointing.configure, which the script calls",
    ),
    _works("dataloader_drop_last disable_python_gc", _WRITTEN),
    _works("optimizer optimizer.type optimizer.params", _PARITY),
    _works(
        "scheduler scheduler.type scheduler.params",
        "engine/checks/test_optimizers.py::test_schedulers_of_torch",
        "those of torch under ZeRO too, but for ReduceLROnPlateau, which is refused: DeepSpeed gives it no loss",
    ),
    _works("optimizer.legacy_fusion", _SAME, "for FusedAdam in fp16"),
    _works("zero_allow_untested_optimizer", _SAME),
    _works("zero_force_ds_cpu_optimizer", _OFFLOAD),
    _idle("disable_allgather vocabulary_size", "no code uses it"),
    _idle("seq_parallel_communication_data_type", "replicas that share sequences stay replicas to ZeRO"),
    _works(
        "sequence_parallel_size",
        "engine/test_sequence_parallel.py::test_gradients_are_those_of_whole_sequences",
        "replicas of the pipeline share each sequence, for the layers of `dualpipe_engine.models` and of adapters",
    ),
    _refused("managed_gradient_accumulation", "a schedule knows where its batch ends", (True,)),
)

PIPELINE = (
    _works(
        "pipeline pipeline.activation_checkpoint_interval pipeline.use_reentrant",
        "engine/placing/test_module.py::test_features",
    ),
    _works(
        "pipeline.pipe_partitioned pipeline.grad_partitioned",
        _SAME,
        "tensor-parallel ranks send whole tensors, whatever it says",
    ),
    _idle("pipeline.stages pipeline.partition pipeline.seed_layers", "arguments of the PipelineModule, not of this"),
)

REPORTS = (
    _works("steps_per_print wall_clock_breakdown dump_state log_level", _WRITTEN),
    _works("memory_breakdown", _WRITTEN, "while the engine is made"),
    _works(
        "tensorboard tensorboard.enabled tensorboard.output_path tensorboard.job_name csv_monitor csv_monitor.enabled "
        "csv_monitor.output_path csv_monitor.job_name",
        _REPORTS,
    ),
    _works(
        "wandb wandb.enabled wandb.group wandb.team wandb.project comet comet.enabled comet.samples_log_interval "
        "comet.project comet.workspace comet.api_key comet.experiment_name comet.experiment_key comet.online "
        "comet.mode",
        _REPORTS,
        "handed the same events",
    ),
    _works(
        "comms_logger comms_logger.enabled comms_logger.prof_all comms_logger.prof_ops comms_logger.verbose "
        "comms_logger.debug",
        _SAME,
        "counts what DeepSpeed sends; what a schedule sends is in the profile",
    ),
    _idle(
        "timers timers.throughput timers.throughput.enabled timers.throughput.synchronized",
        "it times the engine's own forward, which a pipeline does not use",
    ),
    _refused("flops_profiler.enabled", "it counts one forward of the whole model, and no rank has one"),
    _idle(
        "flops_profiler flops_profiler.detailed flops_profiler.module_depth flops_profiler.output_file "
        "flops_profiler.profile_step flops_profiler.recompute_fwd_factor flops_profiler.top_modules",
        "for flops_profiler.enabled",
    ),
)

_E = "expert_parallel"
EXPERTS = (
    _works(
        "expert_parallel expert_parallel.enabled expert_parallel.autoep_size",
        "adapters/test_autoep.py::test_gradients_are_those_of_the_whole_model",
        "experts are shared by replicas of the pipeline, at one position of it",
    ),
    _works(
        "preset_model moe_layer_pattern router_pattern expert_pattern expert_w1 expert_w2 expert_w3 num_experts_attr "
        "top_k_attr has_shared_experts shared_experts_pattern shared_experts_gate_pattern expert_activation top_k "
        "score_func score_apply route_norm route_scale routed_scaling_factor num_expert_groups num_limited_groups "
        "use_grouped_mm disable_triton_grouped_mm gate_up_impl combine_impl",
        "adapters/test_autoep.py::test_every_key_reaches_the_layers",
        "DeepSpeed's parser and layers read it",
        _E,
    ),
    _works(
        "comm_backend comm_num_sm comm_qp_margin comm_max_tokens_per_rank",
        "models/test_deep_ep.py::test_layers_of_autoep_equal_those_of_one_rank",
        "DeepEP in version 2, where it is installed; tested against a stand-in for it",
        _E,
    ),
    *(
        KeyRow(Status.REFUSED, _E, (key,), f"it {why}", "adapters/test_autoep.py::test_what_cannot_work_is_refused")
        for key, (_, why) in REFUSED.items()
        if key != "combine_impl"
    ),
)

PRECISION = (
    _works(
        "fp16 fp16.enabled fp16.loss_scale fp16.initial_scale_power fp16.loss_scale_window fp16.hysteresis "
        "fp16.consecutive_hysteresis fp16.min_loss_scale",
        "engine/reduction/test_partitioned.py::test_dynamic_loss_scale",
    ),
    _works("fp16.fp16_master_weights_and_grads", "engine/test_keys.py::test_master_weights_in_fp16"),
    _refused("fp16.auto_cast", "inputs enter a schedule as the data loader makes them"),
    _works(
        "bf16 bf16.enabled bf16.immediate_grad_update bf16.check_grad_overflow bf16.bf16_master_weights_and_grads "
        "bf16.bf16_optimizer_states",
        _BF16,
    ),
    _works(
        "bfloat16 bfloat16.enabled bfloat16.immediate_grad_update bfloat16.check_grad_overflow "
        "bfloat16.bf16_master_weights_and_grads bfloat16.bf16_optimizer_states",
        _BF16,
        "the old name of bf16",
    ),
    _works(
        "data_types data_types.grad_accum_dtype data_types.param_dtype data_types.buffer_dtype "
        "data_types.keep_in_fp32_modules",
        _BF16,
    ),
    _works(
        "torch_autocast torch_autocast.enabled torch_autocast.dtype torch_autocast.lower_precision_safe_modules",
        "engine/test_keys.py::test_autocast",
    ),
    _refused(
        "torch_autocast.dtype",
        "its gradient scaler would skip steps on each rank by itself; bfloat16 needs none, and fp16 has a scaler for "
        "all ranks",
        ("bf16", "bfloat16", "torch.bfloat16", "fp32", "float32", "torch.float32", "float"),
    ),
)

CHECKPOINTS = (
    _works(
        "checkpoint checkpoint.tag_validation checkpoint.checkpoint_serialization checkpoint.parallel_write "
        "checkpoint.parallel_write.pipeline_stage",
        _SAVED,
    ),
    _works(
        "checkpoint.load_universal",
        "engine/checkpoint/test_checkpoint.py::test_the_optimizer_moves_through_universal_checkpoints",
    ),
    _works(
        "checkpoint.async",
        "engine/checkpoint/test_save.py::test_a_save_in_the_background_is_that_of_a_plain_one",
        "ours: files are written by a thread while training goes on",
    ),
    _refused("checkpoint.use_node_local_storage", "rank 0 gives a checkpoint its name when the files of all are there"),
    _refused(
        "checkpoint.writer datastates_ckpt",
        "a checkpoint takes its name when all files are there, which such a writer does not tell",
        (None, False),
    ),
    _idle("checkpoint.writer.*", "for checkpoint.writer"),
)

_Z = "zero_optimization"
ZERO = (
    _works(
        "zero_optimization zero_optimization.stage",
        "engine/reduction/test_partitioned.py::test_zero_2_trains_like_stock_zero_1",
    ),
    _works(
        "reduce_bucket_size allgather_bucket_size parameter_alignment round_robin_gradients compute_grad_norm",
        _SAME,
        section=_Z,
    ),
    _works(
        "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce",
        _SAME,
        "a stage's gradients are reduced to their owners, whatever it says",
        _Z,
    ),
    _works("load_from_fp32_weights", _SAVED, section=_Z),
    _idle("overlap_comm", "a pipeline switches it off; a schedule overlaps by its own means", _Z),
    _idle("allgather_partitions memory_efficient_linear", "no code uses it", _Z),
    _works("offload_optimizer offload_optimizer.device cpu_offload", _OFFLOAD, section=_Z),
    _works("offload_optimizer.pin_memory", _OFFLOAD, "memory of the host", _Z),
    KeyRow(Status.REFUSED, _Z, ("offload_param", "offload_param.device", "cpu_offload_param"), _ZERO_3, _SENTENCE),
    _refused(
        "ignore_unused_parameters",
        "each rank runs some micro-batches, so that a parameter may have no gradient on one of its ranks",
        (True,),
        _Z,
    ),
    _refused("zenflow", "it steps by its own count of backwards, and a schedule has none", (None,), _Z),
    _idle("zenflow.*", "for zenflow", _Z),
    _refused("elastic_checkpoint", "universal checkpoints load on any number of ranks", section=_Z),
    _refused("legacy_stage1", _GONE, section=_Z),
    _refused("mics_shard_size mics_hierarchical_params_gather zeropp_loco_param", _GONE, (), _Z),
    _refused(
        "zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights", _ZERO_3, section=_Z
    ),
    _refused("zero_hpz_partition_size", _ZERO_3, (0, 1), _Z),
    _idle(
        "offload_optimizer.buffer_count offload_optimizer.nvme_path offload_optimizer.pipeline_read "
        "offload_optimizer.pipeline_write offload_optimizer.fast_init offload_optimizer.ratio "
        "offload_optimizer.super_offload offload_optimizer.cpuadam_cores_perc offload_param.buffer_count "
        "offload_param.buffer_size offload_param.max_in_cpu offload_param.nvme_path offload_param.pin_memory "
        "cpu_offload_use_pin_memory sub_group_size stage3_prefetch_bucket_size stage3_param_persistence_threshold "
        "stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance "
        "stage3_gather_16bit_weights_on_model_save stage3_module_granularity_threshold "
        "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential "
        "stage3_gather_fp16_weights_on_model_save pipeline_loading_checkpoint override_module_apply "
        "log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory leaf_module "
        "leaf_module.classes leaf_module.names leaf_module.name_suffixes",
        _ZERO_3,
        _Z,
    ),
    _idle(
        "aio aio.block_size aio.queue_depth aio.intra_op_parallelism aio.single_submit aio.overlap_events aio.use_gds",
        "for NVMe, which ZeRO-3 uses",
    ),
)

OTHER_ENGINES = (
    _refused("autotuning.enabled", "it starts jobs of DeepSpeed's own engines"),
    _idle("autotuning autotuning.*", "for autotuning.enabled"),
    _refused("compile.deepcompile", "it compiles the engine's own forward; engine.compile() compiles the stages"),
    _idle("compile compile.*", "for compile.deepcompile"),
    _refused("data_efficiency.enabled", "its sampler is that of a data-parallel rank, not of both ends of a pipeline"),
    _idle("data_efficiency data_efficiency.*", "for data_efficiency.enabled"),
    _refused("use_data_before_expert_parallelism", "experts are shared within one position of the pipeline"),
    _refused("hybrid_engine.enabled", "it generates text with the whole model, and no rank has one"),
    _idle("hybrid_engine hybrid_engine.*", "for hybrid_engine.enabled"),
    _refused("tensor_parallel.autotp_size", "layers are cut by their authors (PipeModelDataParallelTopology)", (0, 1)),
    _idle("tensor_parallel tensor_parallel.*", "for tensor_parallel.autotp_size"),
    _idle("weight_quantization weight_quantization.*", "only zero.Init reads it, for ZeRO-3"),
    _refused(
        "amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula "
        "progressive_layer_drop quantize_training sparse_attention sparse_gradients",
        _GONE,
        (),
    ),
)

#: Heading of the table -> its rows.
TABLES: dict[str, tuple[KeyRow, ...]] = {
    "Batches, optimizer, gradients": TRAINING,
    "Pipeline": PIPELINE,
    "Experts of models of others": EXPERTS,
    "Precision": PRECISION,
    "ZeRO": ZERO,
    "Checkpoints": CHECKPOINTS,
    "What is written": REPORTS,
    "Other engines of DeepSpeed": OTHER_ENGINES,
}


def refuse_keys(config: Settings, instead: str) -> None:
    """Refuse the first key that cannot work under a schedule.

    Args:
        config: the DeepSpeed configuration.
        instead: the "schedule" that could take it.

    Raises:
        ConfigError: there is one; the message says why it is refused and what to do.
    """
    for row in (row for rows in TABLES.values() for row in rows):
        for path in () if row.off is None else row.paths:
            above, _, key = path.rpartition(".")
            inner = _section(config, above)
            if key not in inner or inner[key] in (row.off or ()) or inner.get("enabled") is False:
                continue
            remedy = "leave it out" if row.why == _GONE else f'leave it out, or take "schedule": "{instead}"'
            raise ConfigError(f"{_quoted(path, repr(inner[key]))} is refused, because {row.why}: {remedy}")


def refuse_misspelt(config: Settings) -> None:
    """Refuse the first key that DeepSpeed would pass over and that is nearly one that it reads.

    Keys of others pass: those that only begin like one of DeepSpeed's ("checkpoint_dir"), and those that are put aside
    by a first character that is no letter ("_optimizer").

    Raises:
        ConfigError: there is one; the message names the nearest.
    """
    known: dict[str, set[str]] = {}
    for path in (path for rows in TABLES.values() for row in rows for path in row.paths):
        section, _, key = path.rpartition(".")
        known.setdefault(section, set()).add(key)
    del known["pipeline"], known[_E]  # their readers know more keys, and check them
    for section, names in known.items():
        for key in () if "*" in names else _section(config, section):
            if not isinstance(key, str) or key in names or not key[:1].isalpha():
                continue
            near = get_close_matches(key.lower(), names, n=1, cutoff=0.8)
            if near and not key.startswith(f"{near[0]}_"):
                path = f"{section}.{key}" if section else key
                raise ConfigError(
                    f'nothing reads the key {_quoted(path, "...")}: did you mean "{near[0]}"? '
                    'A key of your own may begin with "_"'
                )


def _section(config: Settings, path: str) -> Mapping[str, object]:
    """The section at a path; empty if there is none."""
    inner: object = config
    for name in path.split(".") if path else ():
        inner = inner.get(name) if isinstance(inner, Mapping) else None
    return inner if isinstance(inner, Mapping) else {}


def _quoted(path: str, value: str) -> str:
    """A key with its value, as the configuration has it."""
    name = path.replace(".", '": {"')
    return f'"{name}": {value}{"}" * path.count(".")}'
