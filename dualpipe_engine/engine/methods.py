"""What becomes of each public name of DeepSpeed's engines under a schedule.

`surface.py` refuses what stands here as refused, and `python docs/tables.py` writes all rows into docs/engine.md.
Methods that only return a value of the configuration need no row.
"""

from __future__ import annotations

_ONE_BATCH = "train_batch() runs all forwards and backwards of a batch and steps, eval_batch() evaluates"
_WHOLE = "this rank has some layers only: `dualpipe export` or dualpipe_engine.adapters.gather_state_dict joins them"
_ZERO_3 = 'DeepSpeed moves the states of ZeRO-3 only; "offload_optimizer" keeps those of ZeRO-1 and 2 on the host'
_SAMPLER = '"data_efficiency" is refused, so that no sampler takes it; engine.set_batch_fn changes batches'

#: Method -> what to do instead.
REFUSED: dict[str, str] = {
    "forward": _ONE_BATCH,
    "backward": _ONE_BATCH,
    "step": _ONE_BATCH,
    "scale": _ONE_BATCH,
    "no_sync": "gradients are reduced once a batch, by train_batch()",
    "coalesce_grad_reduction": "gradients are reduced once a batch, by train_batch()",
    "set_gradient_accumulation_boundary": "train_batch() ends each batch with a step",
    "save_16bit_model": _WHOLE,
    "save_fp16_model": _WHOLE,
    "offload_states": _ZERO_3,
    "reload_states": _ZERO_3,
    "random_ltd_initialize": _SAMPLER,
    "set_custom_curriculum_learning_schedule": _SAMPLER,
    "set_data_post_process_func": _SAMPLER,
}

_STOCK_BUFFERS = (
    "agg_loss eval_return_logits first_gradient_send first_output_send fwd_outputs grad_layer "
    "grad_partition_grad_layer_meta_cache is_grad_partitioned is_pipe_partitioned log_batch_step_id loss meta_buffer "
    "num_pipe_buffers outputs pipe_buffers pipe_partition_grad_meta_cache pipe_partition_input_meta_cache "
    "pipe_partition_output_meta_cache pipe_recv_buf summary_events total_additional_losses total_loss"
)
#: Attributes of the instruction schedule of stock DeepSpeed, which does not run here.
REFUSED_ATTRIBUTES = frozenset(_STOCK_BUFFERS.split())

_VIEW = "engine/test_methods.py::test_the_client_sees_its_own_pipeline"
_STOCK = "engine/test_methods.py::test_answers_are_those_of_stock"

#: Test -> names that work.
WORKS: dict[str, str] = {
    "engine/test_parity.py::test_trains_like_stock": "train_batch get_global_grad_norm get_lr optimizer lr_scheduler",
    "engine/test_topologies.py::test_changed_batch_size": "set_train_batch_size micro_batches",
    "engine/test_topologies.py::test_replicas": "compile is_compiled",
    "engine/placing/test_module.py::test_features": "eval_batch training_dataloader data_iterator",
    "engine/batches/test_batch_kinds.py::test_labels_may_be_anything": "set_batch_fn batch_fn",
    "engine/test_classifier.py::test_loaders_that_the_engine_makes": "deepspeed_io collate_fn training_data",
    "engine/checkpoint/test_checkpoint.py::test_a_resumed_run_is_the_uninterrupted_one": (
        "save_checkpoint load_checkpoint module_state_dict load_module_state_dict checkpoint_engine"
    ),
    "engine/test_reporting.py::test_reports_like_stock": "get_additional_losses agg_additional_losses agg_train_loss "
    "is_gradient_accumulation_boundary monitor global_steps global_samples",
    "engine/test_reporting.py::test_curriculum_of_sequence_lengths": "reset_activation_shape",
    "engine/reduction/test_partitioned.py::test_overflow_on_one_rank_skips_the_step_on_all": "skipped_steps",
    "engine/reduction/test_norm.py::test_squares_in_pieces": "clip_fp32_gradients",
    _VIEW: "grid num_stages stage_id prev_stage next_stage is_first_stage is_last_stage get_pipeline_parallel_rank "
    "get_data_parallel_rank get_model_parallel_rank get_tensor_parallel_rank is_pipe_parallel is_data_parallel "
    "is_model_parallel set_train_micro_batch_size micro_batch_size set_dataloader set_dataiterator global_rank",
    _STOCK: "communication_data_type get_type get_mom get_data_types get_optimizer_configuration get_batch_info "
    "get_sequence_parallel_group get_wall_clock_timers is_deepcompile_active is_first_weights_partition_group "
    "was_step_applied dynamic_shape has_attention_mask has_bool_tensors zero_cpu_offload zero_nvme_offload_optimizer "
    "zero_optimization_partition_gradients zero_optimization_partition_weights zero_use_cpu_optimizer "
    "uses_parallelization_pass_only torch_autocast_lower_precision_safe_modules autotuning_metric_path "
    "autotuning_model_info_path flops_profiler_detailed flops_profiler_profile_step",
}

#: Why nothing of a schedule touches them -> names that are as in DeepSpeed's own pipeline engine.
AS_STOCK: dict[str, str] = {
    "constants and helpers": "DTYPE_TO_ID ID_TO_DTYPE all_gather_scalar is_iterable_style_dataset is_map_style_dataset "
    "load_moe_state_dict flatten unflatten",
    "parts of DeepSpeed's own reduction, which runs for sparse gradients and Muon": "allreduce_and_copy "
    "allreduce_bucket allreduce_gradients allreduce_no_retain buffered_allreduce_fallback sparse_all_gather "
    "sparse_allreduce sparse_allreduce_bucket sparse_allreduce_no_retain gradient_average enable_backward_allreduce "
    "pipeline_enable_backward_allreduce use_ds_comm",
    "clear what the step has cleared, free memory, or end": "zero_grad empty_partition_cache collect_python_gc destroy",
    "set the mode of layers, which train_batch and eval_batch set themselves": "train eval",
    "for logs of the instruction schedule or of the engine's own forward": "log_for_device tput_log "
    "print_forward_breakdown timers tput_timer batch_timer engine_timers engine_timers_cache fwd_duration flops "
    "flops_profiler first_dataloader_check losses warn_unscaled_loss scale_wrt_gas "
    "module_forward_pre_hook module_forward_post_hook",
    "an attention mask passes as any tensor does": "set_has_attention_mask",
    "for compile.deepcompile, which is refused": "get_autosp_backend get_autotp_backend get_compile_time "
    "get_deepcompile_backend get_deepspeed_compile_backend register_compile_pass",
    "of features that are refused in the configuration": "autotuning_model_info random_ltd_scheduler mesh_device "
    "optimized_linear_base_weight_sharding optimized_linear_lora_enabled update_interval inside_no_sync_ctxt "
    "all_to_all_group local_all_to_all_group",
    "what initialize was given or found": "basic_optimizer client_lr_scheduler client_optimizer config device "
    "dist_backend dont_change_device local_rank param_names pipeline_parallelism using_bf16_optimizer "
    "torch_autocast_z0_gradscaler dp_group_loss micro_steps",
    "DeepSpeed's view of the ranks, in which two ranks of a bidirectional pipeline that hold the same stages are "
    "data parallel, and that of deepspeed.utils.groups: use grid, data_rank and data_replicas": "mpu world_size "
    "dp_world_size mp_world_size "
    "seq_dp_world_size data_parallel_group seq_data_parallel_group seq_parallel_group sequence_parallel_size "
    "expert_parallel_group expert_data_parallel_group checkpoint_mp_rank "
    "loaded_checkpoint_dp_world_size loaded_checkpoint_mp_world_size "
    "save_non_zero_checkpoint save_zero_checkpoint has_moe_layers moe_layers gate_modules num_experts",
}


def named() -> set[str]:
    """Every name with a row."""
    rows = [*WORKS.values(), *AS_STOCK.values()]
    return {*REFUSED, *REFUSED_ATTRIBUTES, *(name for row in rows for name in row.split())}
