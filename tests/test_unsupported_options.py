"""vLLM's options that are not here are refused by name, with a hint; what asks for nothing is
accepted.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from minivllm import LLM
from minivllm.compat.options import MISSING, NONE_IS_DEFAULT
from minivllm.config import EngineArgs, EngineConfig
from minivllm.errors import ConfigError

NAMES = [name for group in MISSING for name in group.names.split()]
OWN = {field.name for field in dataclasses.fields(EngineConfig)}
#: `LLM.__init__` and `EngineArgs` of vLLM 0.11: every name, so that none is forgotten here.
VLLM = """
model served_model_name tokenizer hf_config_path runner convert task skip_tokenizer_init
enable_prompt_embeds tokenizer_mode trust_remote_code allowed_local_media_path allowed_media_domains
download_dir safetensors_load_strategy load_format config_format dtype kv_cache_dtype seed
max_model_len cuda_graph_sizes cudagraph_capture_sizes max_cudagraph_capture_size
distributed_executor_backend pipeline_parallel_size tensor_parallel_size
decode_context_parallel_size data_parallel_size data_parallel_rank data_parallel_start_rank
data_parallel_size_local data_parallel_address data_parallel_rpc_port data_parallel_hybrid_lb
data_parallel_backend enable_expert_parallel all2all_backend enable_dbo dbo_decode_token_threshold
dbo_prefill_token_threshold disable_nccl_for_dp_synchronization eplb_config enable_eplb
expert_placement_strategy num_redundant_experts eplb_window_size eplb_step_interval
eplb_log_balancedness max_parallel_loading_workers block_size enable_prefix_caching
prefix_caching_hash_algo disable_sliding_window disable_cascade_attn swap_space cpu_offload_gb
gpu_memory_utilization kv_cache_memory_bytes max_num_batched_tokens max_num_partial_prefills
max_long_partial_prefills long_prefill_token_threshold max_num_seqs max_logprobs logprobs_mode
disable_log_stats aggregate_engine_logging revision code_revision rope_scaling rope_theta hf_token
hf_overrides tokenizer_revision quantization enforce_eager disable_custom_all_reduce
limit_mm_per_prompt enable_mm_embeds interleave_mm_strings media_io_kwargs mm_processor_kwargs
disable_mm_preprocessor_cache mm_processor_cache_gb mm_processor_cache_type
mm_shm_cache_max_object_size_mb mm_encoder_tp_mode mm_encoder_attn_backend io_processor_plugin
skip_mm_profiling video_pruning_rate enable_lora max_loras max_lora_rank default_mm_loras
fully_sharded_loras max_cpu_loras lora_dtype lora_extra_vocab_size ray_workers_use_nsight
num_gpu_blocks_override num_lookahead_slots model_loader_extra_config ignore_patterns
enable_chunked_prefill disable_chunked_mm_input disable_hybrid_kv_cache_manager
structured_outputs_config reasoning_parser guided_decoding_backend guided_decoding_disable_fallback
guided_decoding_disable_any_whitespace guided_decoding_disable_additional_properties
logits_processor_pattern speculative_config show_hidden_metrics_for_version otlp_traces_endpoint
collect_detailed_traces scheduling_policy scheduler_cls external_parameters pooler_config
override_pooler_config compilation_config worker_cls worker_extension_cls kv_transfer_config
kv_events_config generation_config enable_sleep_mode override_generation_config model_impl
override_attention_dtype calculate_kv_scales mamba_cache_dtype mamba_ssm_cache_dtype
mamba_block_size additional_config use_tqdm_on_load pt_load_map_location
enable_multimodal_encoder_data_parallel logits_processors async_scheduling kv_sharing_fast_prefill
max_seq_len_to_capture disable_async_output_proc
"""


def test_no_option_of_vllm_is_forgotten() -> None:
    assert set(VLLM.split()) - OWN - set(NAMES) == {
        "model",
        "scheduler_cls",
    }  # arguments of LLM themselves
    assert len(NAMES) == len(set(NAMES)) > 200
    assert not OWN & set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_option_of_vllm_is_refused_by_name(name: str) -> None:
    [hint] = [group.hint for group in MISSING if name in group.names.split()]
    with pytest.raises(ConfigError) as caught:
        LLM(device="cpu", **{name: "something"})
    assert (
        str(caught.value) == f"{name}='something' is an option of vLLM that minivllm lacks: {hint}."
    )


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"trust_remote_code": True}, "never runs code"),
        ({"quantization_config": {"bits": 4}}, "quantization='fp8' or 'int8'"),
        ({"enable_lora": True}, "merge"),
        ({"pipeline_parallel_size": 2}, "tensor_parallel_size"),
        ({"pipeline_parallel_size": True}, "tensor_parallel_size"),  # True is no 1
        ({"num_gpu_blocks_override": 100}, "num_kv_blocks"),
        ({"swap_space": 4}, "computed again"),
        ({"tokenizer": "gpt2"}, "skip_tokenizer_init"),
        ({"revision": "main"}, "snapshot_download"),
        ({"hf_overrides": {"rope_theta": 1e6}}, "config.json"),
        ({"enable_chunked_prefill": False}, "always computed in chunks"),
        ({"speculative_model": "somewhere", "max_num_seqs": 4}, "give speculative_config="),
    ],
    ids=str,
)
def test_the_hint_says_what_to_do(options: dict[str, Any], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        LLM(device="cpu", **options)
    with pytest.raises(ConfigError, match=hint):
        EngineArgs(None, **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for group in MISSING
        for name in group.names.split()
        for value in group.accepted
    ],
)
def test_a_value_that_asks_for_nothing_changes_nothing(name: str, value: Any) -> None:
    assert EngineConfig.from_options({"max_num_seqs": 4, name: value}) == EngineConfig(
        max_num_seqs=4
    )


def test_a_script_for_vllm_runs_when_it_asks_for_nothing_special() -> None:
    options = {
        "trust_remote_code": False,
        "quantization": None,
        "tokenizer": None,
        "tokenizer_mode": "auto",
    }
    options |= {
        "pipeline_parallel_size": 1,
        "enable_chunked_prefill": True,
        "swap_space": 0,
        "revision": None,
    }
    options |= {
        "seed": None,
        "enable_prefix_caching": None,
        "max_num_seqs": None,
        "task": "generate",
    }
    with LLM(device="cpu", num_kv_blocks=16, **options) as llm:
        config = llm.llm_engine.config
        assert (config.seed, config.enable_prefix_caching, config.max_num_seqs) == (0, True, 256)
        assert llm.generate("Once", use_tqdm=False)[0].finished


@pytest.mark.parametrize("name", NONE_IS_DEFAULT)
def test_none_is_the_default_where_vllm_has_it_so(name: str) -> None:
    assert EngineConfig.from_options({name: None}) == EngineConfig()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_model_length", "did you mean max_model_len?"),
        ("max_num_sequences", "did you mean max_num_seqs?"),
        ("enforce_eagre", "did you mean enforce_eager?"),
        ("tensor_parallel", "did you mean tensor_parallel_size?"),
        ("trust_remote_cod", "did you mean trust_remote_code?"),
        ("zzz", "lists all options"),
        ("", "lists all options"),
    ],
)
def test_an_unknown_name_says_what_may_have_been_meant(name: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(device="cpu", **{name: 1})
    assert f"There is no option {name!r}" in str(caught.value)
    assert meant in str(caught.value)
