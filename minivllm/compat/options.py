"""Options of vLLM's `LLM(...)` and `EngineArgs` that minivllm lacks, and what to do instead.

Each option is refused with a hint. A value is accepted, and changes nothing, if it asks for what
minivllm does anyway (a feature switched off, or the only choice). The names are those of vLLM's
engine arguments, from version 0.8 to the versions of 2026.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from minivllm.errors import ConfigError, UnknownOptionError
from minivllm.validation import shown


@dataclass(frozen=True)
class Missing:
    """A group of vLLM's options that minivllm lacks, for one reason."""

    names: str  # separated by spaces
    hint: str
    accepted: tuple[Any, ...] = (None, False)  # values that ask for nothing


#: The values of options that switch a feature off, or that hold details of an unused feature.
OFF: tuple[Any, ...] = (None, False, {}, [], "", 0, 0.0)

MISSING = (
    Missing("trust_remote_code code_revision", "minivllm never runs code of a checkpoint"),
    Missing(
        "quantization_config allow_deprecated_quantization",
        "quantization='fp8' or 'int8' quantizes the weights when they are loaded, and a quantized "
        "checkpoint says itself how it is stored",
    ),
    Missing(
        "kv_cache_dtype_skip_layers",
        "kv_cache_dtype holds for all layers",
        (None, []),
    ),
    Missing(
        "tokenizer tokenizer_revision",
        "the tokenizer is read from the model's directory; copy its files there, or use "
        "skip_tokenizer_init=True and token ids",
    ),
    Missing("tokenizer_mode", "there is one kind of tokenizer", (None, "auto")),
    Missing(
        "revision download_dir hf_token hf_config_path ignore_patterns",
        "fetch what you want with huggingface_hub.snapshot_download(...) and give its directory as"
        " model; a token is read from the environment variable HF_TOKEN",
        (None, False, [], "original/**/*", ["original/**/*"]),
    ),
    Missing(
        "hf_overrides rope_scaling rope_theta max_position_embeddings model_class_overrides",
        "change config.json in a copy of the model's directory",
        (None, {}),
    ),
    Missing(
        "override_generation_config",
        "give SamplingParams with the request, or generation_config='vllm'",
        (None, {}),
    ),
    Missing("config_format", "config.json of Hugging Face is the one format", (None, "auto", "hf")),
    Missing("model_impl", "minivllm has its own models", (None, "auto", "vllm")),
    Missing(
        "model_loader_extra_config safetensors_load_strategy pt_load_map_location use_tqdm_on_load "
        "max_parallel_loading_workers weight_transfer_config",
        "weights are read from mapped safetensors files, and there is nothing to set",
        (None, False, {}, "lazy", "cpu"),
    ),
    Missing("task", "minivllm generates text", (None, "auto", "generate")),
    Missing("runner", "minivllm generates text", (None, "auto", "generate")),
    Missing(
        "convert pooler_config override_pooler_config",
        "minivllm generates text; it has no embed, score or classify",
        (None, "auto", "none"),
    ),
    Missing(
        "enable_lora enable_lora_bias max_loras max_lora_rank max_cpu_loras lora_dtype"
        " lora_extra_vocab_size fully_sharded_loras default_mm_loras lora_modules"
        " lora_target_modules enable_tower_connector_lora specialize_active_lora"
        " enable_mixed_moe_lora_format enable_moe_shared_loras enable_prompt_adapter"
        " max_prompt_adapters max_prompt_adapter_token",
        "minivllm has no adapters; merge them into the weights (PEFT's merge_and_unload) and load"
        " those",
    ),
    Missing(
        "speculative_model num_speculative_tokens num_lookahead_slots spec_method spec_model"
        " spec_tokens",
        "give speculative_config={'method': ..., 'num_speculative_tokens': ...}",
        (None, 0, {}, "none"),
    ),
    Missing(
        "per_request_spec_decode_metrics",
        "every `RequestOutput.metrics` counts the request's proposals already",
        (None, False, True),
    ),
    Missing(
        "structured_outputs_config guided_decoding_backend guided_decoding_disable_fallback "
        "guided_decoding_disable_any_whitespace guided_decoding_disable_additional_properties",
        "a request brings its own structured_outputs, and llguidance serves all of them",
        (*OFF, "auto", "guidance"),
    ),
    Missing(
        "reasoning_parser reasoning_parser_plugin reasoning_config enable_reasoning",
        "minivllm does not parse its output",
        OFF,
    ),
    Missing(
        "logits_processors logits_processor_pattern",
        "use logit_bias of SamplingParams, or your own `sample` in LLM(kernels=...)",
        (None, []),
    ),
    Missing(
        "pipeline_parallel_size data_parallel_size data_parallel_size_local"
        " prefill_context_parallel_size decode_context_parallel_size nnodes"
        " dcp_kv_cache_interleave_size cp_kv_cache_interleave_size",
        "minivllm splits a model over GPUs by tensor_parallel_size; start several engines for more"
        " requests",
        (None, 1),
    ),
    Missing(
        "data_parallel_rank data_parallel_start_rank data_parallel_address data_parallel_rpc_port "
        "data_parallel_hybrid_lb data_parallel_external_lb data_parallel_multi_port_external_lb "
        "data_parallel_backend node_rank master_addr master_port dcp_comm_backend dcp_q_replicate "
        "dp_sync_interval disable_nccl_for_dp_synchronization",
        "there is no data parallelism; start several engines, each on its own GPU",
        (None, False, "mp"),
    ),
    Missing(
        "enable_expert_parallel all2all_backend enable_eplb eplb_config num_redundant_experts"
        " eplb_window_size eplb_step_interval eplb_log_balancedness expert_placement_strategy"
        " enable_ep_weight_filter moe_backend enable_elastic_ep enable_dbo ubatch_size"
        " dbo_decode_token_threshold dbo_prefill_token_threshold enable_bf16x3_router_gemm",
        "minivllm has no mixture-of-experts models",
    ),
    Missing(
        "distributed_executor_backend worker_cls worker_extension_cls worker_use_ray"
        " ray_workers_use_nsight distributed_timeout_seconds cpu_distributed_timeout_seconds"
        " numa_bind numa_bind_nodes numa_bind_cpus enable_fault_tolerance fault_tolerance_config",
        "tensor_parallel_size starts processes here, and torchrun starts them elsewhere",
        (None, False, "mp", "uni", "auto", ""),
    ),
    Missing("device_ids", "choose GPUs by the environment variable CUDA_VISIBLE_DEVICES"),
    Missing(
        "num_gpu_blocks_override num_gpu_blocks num_cpu_blocks",
        "the number of KV blocks is the option num_kv_blocks",
    ),
    Missing("kv_cache_memory_bytes", "set num_kv_blocks or gpu_memory_utilization"),
    Missing(
        "swap_space cpu_offload_gb cpu_offload_params offload_backend offload_group_size"
        " offload_num_in_group offload_prefetch_step offload_params kv_offloading_size"
        " kv_offloading_backend kv_transfer_config kv_events_config ec_transfer_config"
        " ec_manager_config enable_cumem_allocator",
        "nothing is moved to another memory: weights and cache must fit, and a sequence that has"
        " lost its blocks is computed again",
        (None, False, 0, 0.0, [], set()),
    ),
    Missing("enable_chunked_prefill", "long prompts are always computed in chunks", (None, True)),
    Missing(
        "max_num_partial_prefills max_long_partial_prefills long_prefill_token_threshold"
        " max_num_scheduled_tokens scheduler_reserve_full_isl prefill_schedule_interval watermark"
        " max_num_queued_reqs max_num_queued_tokens num_scheduler_steps multi_step_stream_outputs"
        " scheduler_delay_factor preemption_mode stream_interval external_parameters policy",
        "one step's budget is max_num_batched_tokens; other policies can be written as a"
        " scheduler_cls",
    ),
    Missing("scheduling_policy", "requests are served in their order", (None, "fcfs")),
    Missing(
        "prefix_caching_hash_algo prefix_cache_retention_interval prefix_match_unit",
        "the prefix cache has no variants; enable_prefix_caching=False switches it off",
    ),
    Missing(
        "compilation_config optimization_level performance_mode cudagraph_capture_sizes"
        " cuda_graph_sizes max_cudagraph_capture_size max_seq_len_to_capture"
        " max_context_len_to_capture kernel_config attention_config linear_backend"
        " use_v2_block_manager disable_async_output_proc enable_flashinfer_autotune ir_op_priority"
        " kv_sharing_fast_prefill disable_cascade_attn disable_hybrid_kv_cache_manager"
        " enable_batch_sharded_sampling override_attention_dtype gdn_prefill_backend"
        " kda_prefill_backend use_fp64_gumbel",
        "minivllm does not compile models; enforce_eager=True switches CUDA graphs off",
        (None, False, {}),
    ),
    Missing(
        "disable_sliding_window",
        "models with a sliding window are refused, so there is nothing to switch off",
        (None, False, True),
    ),
    Missing("logprobs_mode", "logprobs are of the raw logits", (None, "raw_logprobs")),
    Missing(
        "mm_processor_kwargs limit_mm_per_prompt allowed_local_media_path allowed_media_domains"
        " disable_mm_preprocessor_cache mm_processor_cache_gb mm_processor_cache_type"
        " mm_hasher_algorithm mm_shm_cache_max_object_size_mb mm_encoder_only mm_encoder_tp_mode"
        " mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path"
        " mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin mm_tensor_ipc"
        " mm_processor_device mm_ipc_gpu_memory_gb mm_device_do_normalize enable_mm_embeds"
        " interleave_mm_strings media_io_kwargs skip_mm_profiling video_pruning_rate"
        " video_pruning_method disable_chunked_mm_input enable_mm_processor_stats"
        " enable_multimodal_encoder_data_parallel language_model_only io_processor_plugin",
        "minivllm reads text only",
        OFF,
    ),
    Missing("enable_prompt_embeds", "a prompt is text or token ids"),
    Missing(
        "mamba_cache_dtype mamba_ssm_cache_dtype mamba_block_size mamba_cache_mode mamba_backend"
        " mamba_ssu_algorithm mamba_config mamba_cache_philox_rounds"
        " enable_mamba_cache_stochastic_rounding replayssm_buffer_len use_replayssm"
        " diffusion_config",
        "minivllm has decoders with attention only",
        (None, False, {}, "auto"),
    ),
    Missing(
        "enable_sleep_mode enable_nccl_comm_suspend",
        "minivllm has no sleep and wake_up; `LLM.close()` gives the memory back",
    ),
    Missing("disable_log_stats", "nothing is logged per step; ask LLM.metrics()", (None, True)),
    Missing(
        "show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces"
        " kv_cache_metrics kv_cache_metrics_sample cudagraph_metrics enable_layerwise_nvtx_tracing"
        " enable_mfu_metrics enable_logging_iteration_details jit_monitor_mode jit_monitor_verbose"
        " profiler_config enable_trace_replay aggregate_engine_logging",
        "LLM(trace=True) records every step, and LLM.metrics() counts",
    ),
    Missing(
        "served_model_name api_key tokens_only renderer_num_workers shutdown_timeout"
        " disable_log_requests",
        "there is no server; this is a library",
    ),
    Missing(
        "chat_template chat_template_content_format",
        "give it with the call: LLM.chat(..., chat_template=...)",
    ),
    Missing(
        "additional_config fail_on_environ_validation",
        "minivllm has no such setting",
        (None, False, {}),
    ),
)

#: For these options None means the default in vLLM. In minivllm their type does not include None.
NONE_IS_DEFAULT = ("max_num_seqs", "enable_prefix_caching", "seed")


def own_options(options: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    """Select the options that minivllm has. known: the names of these options.

    Raises `ConfigError` for an option that only vLLM has (unless its value asks for nothing), and
    `UnknownOptionError` for an unknown name.
    """
    missing = dict(_by_name())
    own = {}
    for name, value in options.items():
        if name in known:
            if value is not None or name not in NONE_IS_DEFAULT:
                own[name] = value
        elif name not in missing:
            raise UnknownOptionError(_unknown(name, (*known, *missing)))
        elif not any(
            type(value) is type(harmless) and value == harmless
            for harmless in missing[name].accepted
        ):
            raise ConfigError(
                f"{name}={shown(value)} is an option of vLLM that minivllm lacks:"
                f" {missing[name].hint}."
            )
    return own


def _by_name() -> Iterator[tuple[str, Missing]]:
    for group in MISSING:
        for name in group.names.split():
            yield name, group


def _unknown(name: object, names: tuple[str, ...]) -> str:
    close = get_close_matches(str(name), names, n=1)
    hint = (
        f"did you mean {close[0]}?"
        if close
        else "`EngineConfig` in minivllm/config.py lists all options."
    )
    return f"There is no option {shown(name)}; {hint}"
