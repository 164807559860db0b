"""What the model is (`ModelConfig`, from the checkpoint) and how the engine runs it (`EngineConfig`, from the caller).

No hyper-parameter is typed in by hand; what a checkpoint asks for and this package lacks is refused by name.
Taught in notebooks/11_using_minivllm.ipynb."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from minivllm.errors import ConfigError, UnsupportedModelError

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base frequency and how it is stretched for contexts beyond the trained one."""

    theta: float
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0  # llama3, both
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn, this and all below
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. Sizes are in elements."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str
    eos_token_ids: tuple[int, ...]

    @staticmethod
    def from_hf(config: dict[str, Any], generation_config: dict[str, Any] | None = None) -> "ModelConfig":
        """Read a Hugging Face config.json, and generation_config.json for further end-of-sequence tokens.

        Raises `UnsupportedModelError` for anything that would otherwise give silently wrong tokens.
        """
        _refuse_unsupported(config)
        architecture = config["architectures"][0]
        is_qwen2, attention_bias = architecture.startswith("Qwen2"), bool(config.get("attention_bias", False))
        heads = config["num_attention_heads"]
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
        return ModelConfig(
            architecture=architecture, **{name: config[name] for name in required}, num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6), rope=_rope_from_hf(config),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=is_qwen2 or attention_bias, o_bias=attention_bias and not is_qwen2,
            mlp_bias=bool(config.get("mlp_bias", False)), qk_norm=architecture.startswith("Qwen3"),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
            eos_token_ids=_eos_token_ids(generation_config or {}, config),
        )  # fmt: skip


def _refuse_unsupported(config: dict[str, Any]) -> None:
    architecture = (config.get("architectures") or ["(none)"])[0]
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(f"Architecture {architecture} is none of the supported {', '.join(ARCHITECTURES)}.")
    sliding = config.get("use_sliding_window") and config.get("sliding_window")
    if sliding or "sliding_attention" in (config.get("layer_types") or []):
        raise UnsupportedModelError("This checkpoint uses sliding-window attention, which minivllm does not implement.")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown")
        raise UnsupportedModelError(f"The checkpoint is quantized ({method}); minivllm loads unquantized weights only.")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise UnsupportedModelError(f"Activation {activation!r} is not supported; the decoder's MLP is SwiGLU.")
    if config["num_attention_heads"] % (config.get("num_key_value_heads") or config["num_attention_heads"]):
        raise UnsupportedModelError("num_attention_heads must be a multiple of num_key_value_heads.")


def _rope_from_hf(config: dict[str, Any]) -> RopeConfig:
    # transformers 5 writes `rope_parameters`; before it, `rope_scaling` stood beside `rope_theta`.
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    if any(isinstance(value, dict) for value in rope.values()):
        raise UnsupportedModelError("A rope of its own for each type of layer is not supported.")
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(f"Rope type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}.")
    if (rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedModelError("Partial rotary embeddings are not supported.")
    optional = ("low_freq_factor", "high_freq_factor", "attention_factor", "mscale", "mscale_all_dim", "truncate")
    # Some configs have the length before stretching beside the rope's fields; transformers prefers that one.
    name = "original_max_position_embeddings"
    original = config.get(name) or rope.get(name) or config["max_position_embeddings"]
    if rope_type == "yarn" and rope.get("factor") is None:  # DeepSeek-V3's convention, followed by transformers
        rope["factor"] = config["max_position_embeddings"] / original
    return RopeConfig(
        theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0), rope_type=rope_type,
        factor=1.0 if rope_type == "default" else float(rope["factor"]), original_max_position=original,
        beta_fast=rope.get("beta_fast") or 32.0, beta_slow=rope.get("beta_slow") or 1.0,
        **{name: rope[name] for name in optional if rope.get(name) is not None},
    )  # fmt: skip


def _eos_token_ids(*sources: dict[str, Any]) -> tuple[int, ...]:
    found = [source["eos_token_id"] for source in sources if source.get("eos_token_id") is not None]
    return tuple(dict.fromkeys(i for ids in found for i in (ids if isinstance(ids, list) else [ids])))


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs. Names are vLLM's where it has them; None means "decide for me", stated beside each."""

    dtype: str = "auto"  # "auto": the checkpoint's dtype on a GPU, float32 on a CPU
    device: str = "auto"  # "auto": cuda when there is one
    max_model_len: int | None = None  # longest prompt plus output, in tokens; None: what the checkpoint was trained for
    max_num_seqs: int = 256  # most sequences running at once
    max_num_batched_tokens: int | None = None  # token budget of one step; None: 8192 on a GPU, 2048 on a CPU
    block_size: int | None = None  # tokens in a KV block; None: 64 on a GPU, 16 on a CPU
    #: Blocks in the KV cache. None: what gpu_memory_utilization leaves on a GPU, a modest fixed size on a CPU.
    num_kv_blocks: int | None = None
    gpu_memory_utilization: float = 0.9  # share of its memory that weights, activations and KV cache may take together
    enable_prefix_caching: bool = True
    enforce_eager: bool = False  # no CUDA graphs; always so on a CPU and with kernels that wait for the GPU
    async_scheduling: bool | None = None  # plan a step while the one before runs; None: on a GPU, not on a CPU
    attention_backend: str = "auto"  # "auto": Triton on a GPU, torch on a CPU, where "triton" means its interpreter
    load_format: str = "auto"  # "auto" reads safetensors; "dummy" draws random weights and needs config.json only
    skip_tokenizer_init: bool = False  # token ids in and out, no text
    tensor_parallel_size: int = 1  # ranks that share the model; under torchrun, the number of its processes
    seed: int = 0  # of dummy weights, and of requests that bring none of their own
    trace: bool = False  # record what happens at each step; see `minivllm.engine.trace`

    def __post_init__(self) -> None:
        backends, formats = ("auto", "triton", "torch"), ("auto", "safetensors", "dummy")
        choices = {"dtype": ("auto", *DTYPES), "attention_backend": backends, "load_format": formats}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")
        sizes = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "num_kv_blocks")
        for name in (*sizes, "tensor_parallel_size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}.")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(f"gpu_memory_utilization is above 0 and at most 1, not {self.gpu_memory_utilization}.")

    def resolve(self, model: ModelConfig, device_type: str) -> "EngineConfig":
        """A copy with every "auto" and None decided, but for num_kv_blocks, which needs the loaded model.

        device_type: "cuda" or "cpu". Raises `ConfigError` for combinations that cannot work.
        """
        on_gpu = device_type == "cuda"
        backend = self.attention_backend if self.attention_backend != "auto" else ("triton" if on_gpu else "torch")
        resolved = dataclasses.replace(
            self, device=self.device if self.device != "auto" else device_type,
            dtype=self.dtype if self.dtype != "auto" else (model.dtype if on_gpu else "float32"),
            attention_backend=backend, enforce_eager=self.enforce_eager or not on_gpu or backend != "triton",
            async_scheduling=on_gpu if self.async_scheduling is None else self.async_scheduling,
            max_model_len=self.max_model_len or model.max_position_embeddings,
            max_num_batched_tokens=self.max_num_batched_tokens or (8192 if on_gpu else 2048),
            block_size=self.block_size or (64 if on_gpu else 16),
        )  # fmt: skip
        resolved._check_against(model, on_gpu)
        return resolved

    def _check_against(self, model: ModelConfig, on_gpu: bool) -> None:
        if self.max_model_len > model.max_position_embeddings:
            raise ConfigError(
                f"max_model_len={self.max_model_len} is beyond the {model.max_position_embeddings} positions of the "
                "checkpoint's config; lower it, or set rope scaling in config.json."
            )
        if self.attention_backend == "triton" and (self.block_size < 16 or self.block_size & (self.block_size - 1)):
            raise ConfigError(
                f"block_size={self.block_size}: the Triton kernels need a power of two of at least 16; "
                "attention_backend='torch' takes any size."
            )
        if self.attention_backend == "triton" and not on_gpu and self.dtype != "float32":
            raise ConfigError("Triton's interpreter on a CPU computes right in float32 only; set dtype='float32'.")
        heads, kv_heads, width = model.num_attention_heads, model.num_key_value_heads, model.intermediate_size
        fits = [
            n for n in range(1, heads + 1) if not heads % n and not width % n and (not kv_heads % n or not n % kv_heads)
        ]
        if self.tensor_parallel_size not in fits:
            raise ConfigError(
                f"tensor_parallel_size={self.tensor_parallel_size} does not divide this model of {heads} query heads, "
                f"{kv_heads} KV heads and intermediate_size {width}; possible: {', '.join(map(str, fits))}."
            )
