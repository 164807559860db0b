"""Settings: the shape of the model (`ModelConfig`) and how the engine runs it (`EngineConfig`).

`ModelConfig` comes from the checkpoint; no hyper-parameter is written by hand, and a checkpoint
that needs an unsupported feature is refused with the name of that feature. `EngineConfig` comes
from the caller. The annotation of a field says which values it may have, and validation.py checks
them. Taught in notebooks/11_using_minivllm.ipynb.
"""

import dataclasses
import importlib.util
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from minivllm.compat.options import own_options
from minivllm.errors import ConfigError
from minivllm.sampling_params import MAX_LOGPROBS
from minivllm.validation import Range, annotations_of, check, shown

logger = logging.getLogger(__name__)

DTYPES = ("float32", "float16", "bfloat16")
#: Other names of dtypes, as in torch, transformers and vLLM.
DTYPE_ALIASES = {"float": "float32", "half": "float16"}
#: Another name of a kv_cache_dtype, as in vLLM.
KV_CACHE_DTYPE_ALIASES = {"fp8_e4m3": "fp8"}
#: Bytes of the scale that an int8 cache keeps for each token's K and V, per head.
SCALE_BYTES = 4

#: In bytes: on a CPU and without num_kv_blocks, the KV cache of one sequence of the default
#: max_model_len may take this much over all layers. On a laptop with 8 GB, 1 GiB leaves room for a
#: model of 1 billion parameters.
CPU_SEQUENCE_BYTES = 1 << 30

Count = Annotated[int, Range(1)]

#: Without prompt_lookup_min and _max: the number of tokens that must occur again, as in vLLM.
PROMPT_LOOKUP = 5
#: Without num_speculative_tokens, which only a proposer of the caller's own may leave out.
NUM_SPECULATIVE_TOKENS = 4


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: the base frequency, and the scaling for longer contexts."""

    theta: float
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0  # llama3, as the next field
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn, as all fields below
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class LayerOptions:
    """The differences between the decoder layers of model families.

    A family reads them from config.json, or knows them.
    """

    qkv_bias: bool  # on the projections to Q, K and V
    o_bias: bool  # on the projection of attention's output
    mlp_bias: bool
    qk_norm: bool  # an RMSNorm on every head of Q and of K


@dataclass(frozen=True)
class QuantizedLayers:
    """The linear layers that one entry of a checkpoint's quantization_config is about.

    targets: names of modules, ``re:`` and a regular expression, or "Linear", which means all.
    scale: the name that the tensors of scales have in the checkpoint.
    """

    #: "fp8": e4m3 with a scale per output channel; "fp8_tensor": with one scale; "fp8_block": with
    #: a scale per 128 x 128. "int8": with a scale per output channel; "int8_packed": the same, and
    #: four weights to an int32.
    format: Literal["fp8", "fp8_tensor", "fp8_block", "int8", "int8_packed"]
    targets: tuple[str, ...] = ("Linear",)
    scale: str = "weight_scale"


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """What quantization_config in config.json says. ignored: modules that are not quantized,
    written as targets are.
    """

    method: Literal["fp8", "int8"]
    layers: tuple[QuantizedLayers, ...]
    ignored: tuple[str, ...] = ()

    def of(self, name: str) -> QuantizedLayers | None:
        """The entry for the module of this name; None where it is not quantized."""
        if any(_means(target, name) for target in self.ignored):
            return None
        for layers in self.layers:
            if any(target == "Linear" or _means(target, name) for target in layers.targets):
                return layers
        return None


def _means(target: str, name: str) -> bool:
    """Whether a target means this module: by its name, the end of it, or a module that holds it."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return name == target or name.startswith(f"{target}.") or name.endswith(f".{target}")


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
    #: How the weights of linear layers are stored; None: in `dtype`.
    quantization: QuantizedCheckpoint | None = None

    @property
    def max_model_len(self) -> int:
        """The longest sequence that the checkpoint allows, in tokens, derived as in vLLM.

        YaRN and linear scaling multiply the length of a shorter context by their factor. With
        llama3's scaling, max_position_embeddings is the scaled length already.
        """
        if self.rope.rope_type == "yarn":
            return int(self.rope.original_max_position * self.rope.factor)
        return int(
            self.max_position_embeddings
            * (self.rope.factor if self.rope.rope_type == "linear" else 1)
        )

    @property
    def num_parameters(self) -> int:
        """The number of weights, without biases and norms, which are few."""
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_block_parameters + tables

    @property
    def num_block_parameters(self) -> int:
        """The weights of all blocks: `num_parameters` without embedding and head."""
        # Query and output projections, key and value projections.
        heads = 2 * (self.num_attention_heads + self.num_key_value_heads)
        layer = self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size)
        return self.num_hidden_layers * layer


def kv_bytes_per_token(
    model: ModelConfig, dtype: str, kv_cache_dtype: str, num_kv_heads: int | None = None
) -> int:
    """Bytes of a token's K and V over all layers, an int8 cache's scales included.

    dtype: the model's. num_kv_heads: of one rank; None: all.
    """
    heads = model.num_key_value_heads if num_kv_heads is None else num_kv_heads
    of_model = 4 if dtype == "float32" else 2
    row = model.head_dim * (of_model if kv_cache_dtype == "auto" else 1)
    if kv_cache_dtype == "int8":
        row += SCALE_BYTES
    return 2 * model.num_hidden_layers * heads * row


@dataclass(frozen=True)
class SpeculativeConfig:
    """Speculative decoding: who proposes tokens, and how many. Names are vLLM's.

    "ngram": where the last tokens have occurred before, the tokens that followed there (prompt
    lookup). "draft_model": the tokens that a smaller model samples. None: the caller's own
    `Proposer`. Raises `ConfigError` for a value that does not fit the annotation, and for fields
    that do not belong together.
    """

    method: Literal["ngram", "draft_model"] | None = None
    #: The most tokens that are proposed for a sequence in a step. A sequence whose proposals are
    #: often rejected gets fewer.
    num_speculative_tokens: Annotated[int, Range(1, 64)] | None = None
    #: The draft model: a directory or a hub id, or "draft" for the one that comes with the bundled
    #: model. It must have the vocabulary of the engine's model.
    model: str | None = None
    #: Of "ngram": the most and the fewest last tokens that are searched for, the most first. One
    #: of them alone counts for both; None: 5.
    prompt_lookup_max: Count | None = None
    prompt_lookup_min: Count | None = None
    #: Propose nothing while more sequences than this run: then a step computes so much that the
    #: proposals slow it down. None: 64 on a GPU, 8 on a CPU.
    disable_by_batch_size: Count | None = None

    @classmethod
    def of(cls, value: Any) -> Self:
        """The config that a mapping or a config describes. Raises `ConfigError`."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping) or not value:
            raise ConfigError(
                "speculative_config must be a dict such as {'method': 'ngram',"
                f" 'num_speculative_tokens': 4}}, or None, got {shown(value)}."
            )
        names = [field.name for field in dataclasses.fields(cls)]
        for name in value:
            if name not in names:
                raise ConfigError(
                    f"speculative_config has no field {shown(name)}; its fields are"
                    f" {', '.join(names)}."
                )
        return cls(**value)

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in annotations_of(SpeculativeConfig)}
        if isinstance(self.model, Path):
            values["model"] = str(self.model)
        if values["method"] is None and values["model"] is not None:
            values["method"] = "draft_model"
        for name, annotation in annotations_of(SpeculativeConfig).items():
            try:
                values[name] = check(values[name], annotation)
            except ValueError as error:
                raise ConfigError(f"speculative_config: {name} {error}.") from error
        if values["method"] == "ngram":
            longest, shortest = values["prompt_lookup_max"], values["prompt_lookup_min"]
            values["prompt_lookup_max"] = longest or shortest or PROMPT_LOOKUP
            values["prompt_lookup_min"] = shortest or longest or PROMPT_LOOKUP
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check_together()

    def _check_together(self) -> None:
        """Raise `ConfigError` for fields that do not belong together."""
        lookup = (self.prompt_lookup_min, self.prompt_lookup_max)
        if self.method == "draft_model" and self.model is None:
            raise ConfigError(
                "speculative_config: method='draft_model' needs a model, a directory or a hub id."
            )
        if self.method != "draft_model" and self.model is not None:
            raise ConfigError(
                f"speculative_config: method={self.method!r} takes no model; leave it out, or use"
                " method='draft_model'."
            )
        if self.method != "ngram" and lookup != (None, None):
            raise ConfigError(
                "speculative_config: prompt_lookup_min and prompt_lookup_max belong to"
                " method='ngram'; leave them out."
            )
        if self.method is not None and self.num_speculative_tokens is None:
            raise ConfigError(
                "speculative_config: give num_speculative_tokens, the most tokens to propose at a"
                " time; 4 is a good start."
            )
        shortest, longest = self.prompt_lookup_min or 0, self.prompt_lookup_max or 0
        if shortest > longest:
            raise ConfigError(
                f"speculative_config: prompt_lookup_min={shortest} is above"
                f" prompt_lookup_max={longest}."
            )


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs. Names are vLLM's where vLLM has them.

    None means "decide for me"; the comment of each field says how. Raises `ConfigError` for a value
    that does not fit the annotation. NumPy's numbers and torch's dtypes and devices are converted.
    """

    #: "auto": the checkpoint's dtype on a GPU, float32 on a CPU.
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    #: What the KV cache holds. "auto": numbers of dtype. "fp8" (e4m3) and "int8": 8 bits per
    #: number, so that the same memory holds almost twice as many tokens as in bfloat16. "fp8" is
    #: for GPUs from Ada and Hopper on (a CPU converts it slowly), with one scale per head: 1, or
    #: see calculate_kv_scales. "int8" has a scale per token and head, 4 bytes more.
    kv_cache_dtype: Literal["auto", "fp8", "int8"] = "auto"
    #: With kv_cache_dtype="fp8": measure the scales at the start, on random tokens. For models
    #: whose keys or values are beyond 448, or mostly below 0.02.
    calculate_kv_scales: bool = False
    device: str = "auto"  # "auto": cuda if there is a GPU
    #: Longest prompt plus output, in tokens. None: what the checkpoint allows; on a CPU without
    #: num_kv_blocks no more than fits into 1 GiB of KV cache, with a logged warning.
    max_model_len: Count | None = None
    max_num_seqs: Count = 256  # largest number of sequences that run at once
    #: Token budget of one step. None: 8192 on a GPU, 2048 on a CPU.
    max_num_batched_tokens: Count | None = None
    #: Tokens per KV block; None: 64 on a GPU, 16 on a CPU.
    block_size: Count | None = None
    #: Blocks in the KV cache. None: what gpu_memory_utilization leaves on a GPU; on a CPU 256 MiB,
    #: or one sequence of max_model_len if that is more.
    num_kv_blocks: Count | None = None
    #: Share of the GPU's memory that weights, activations and KV cache may take together.
    gpu_memory_utilization: Annotated[float, Range(0.0, 1.0, above=True)] = 0.9
    enable_prefix_caching: bool = True
    #: Use no CUDA graphs. Always so on a CPU, and with kernels that wait for the GPU.
    enforce_eager: bool = False
    #: Plan a step while the previous one runs. None: True on a GPU, False on a CPU.
    async_scheduling: bool | None = None
    #: "auto": Triton on a GPU, torch on a CPU. On a CPU "triton" means Triton's interpreter
    #: (TRITON_INTERPRET=1).
    attention_backend: Literal["auto", "triton", "torch"] = "auto"
    #: "auto" reads safetensors. "dummy" draws random weights and needs config.json only.
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    #: Weights of 8 bits in all linear layers but the head, quantized when they are loaded. "fp8":
    #: weights and activations in e4m3. "int8": weights only, fast on a CPU, too. None: as the
    #: checkpoint has them, quantized or not. A draft model always is as its checkpoint has it.
    quantization: Literal["fp8", "int8"] | None = None
    skip_tokenizer_init: bool = False  # token ids in and out, no text
    #: Number of ranks that share the model. Under torchrun, the number of its processes.
    tensor_parallel_size: Count = 1
    #: Add up over ranks by NCCL alone. False: through memory that the GPUs of one machine share,
    #: where that is faster at the start; written and tested without GPUs, so it is off by default.
    disable_custom_all_reduce: bool = True
    #: Seed of dummy weights, and of requests without a seed. The range is torch's.
    seed: Annotated[int, Range(-(2**63), 2**64 - 1)] = 0
    #: Sampling defaults for requests without parameters. "auto": the checkpoint's, from
    #: generation_config.json. "vllm": those of `SamplingParams`. End-of-sequence tokens always come
    #: from generation_config.json.
    generation_config: Literal["auto", "vllm"] = "auto"
    #: The most alternatives that a request's `logprobs` and `prompt_logprobs` may ask for. -1: the
    #: whole vocabulary.
    max_logprobs: Annotated[int, Range(-1, 2**31 - 1)] = MAX_LOGPROBS
    #: Record what happens at each step; see `minivllm.engine.trace`.
    trace: bool = False
    #: Speculative decoding: several tokens per step, and the same text. A mapping is taken as the
    #: fields of `SpeculativeConfig`. None: off.
    speculative_config: SpeculativeConfig | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Make the config from options of ``LLM(...)``.

        Raises `ConfigError` for an unknown name (the message suggests a similar one), and for
        options that only vLLM has (the message says what to do instead). An option of vLLM is
        accepted if its value asks for what minivllm does anyway: ``trust_remote_code=False``,
        ``pipeline_parallel_size=1``, ``enable_chunked_prefill=True``,
        ``swap_space=0``. compat/options.py has the list.
        """
        return cls(**own_options(options, tuple(field.name for field in dataclasses.fields(cls))))

    @classmethod
    def choose(cls, config: Self | None, options: Mapping[str, Any]) -> Self:
        """The config, or one made of the options. Raises `ConfigError` where both are given."""
        if config is None:
            return cls.from_options(options)
        if options:
            raise ConfigError(f"Give {', '.join(options)} in the config, or no config.")
        return config

    def __post_init__(self) -> None:
        cls: Any = type(self)
        annotations = annotations_of(cls)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("dtype", "device") and type(value).__module__ == "torch":
                value = str(value).removeprefix("torch.")
            if field.name == "dtype" and isinstance(value, str):
                value = DTYPE_ALIASES.get(value, value)
            if field.name == "kv_cache_dtype" and isinstance(value, str):
                value = KV_CACHE_DTYPE_ALIASES.get(value, value)
            if field.name == "speculative_config":
                value = None if value is None else SpeculativeConfig.of(value)
                object.__setattr__(self, field.name, value)
                continue
            try:
                value = check(value, annotations[field.name])
            except ValueError as error:
                raise ConfigError(f"{field.name} {error}.") from error
            object.__setattr__(self, field.name, value)

    def resolve(self, model: ModelConfig, device_type: str) -> "ResolvedConfig":
        """Decide every "auto" and None.

        device_type: "cuda" or "cpu". Raises `ConfigError` for combinations that cannot work.
        """
        on_gpu = device_type == "cuda"
        backend: str = self.attention_backend
        if backend == "auto":
            backend = "triton" if on_gpu else "torch"
        dtype: str = self.dtype
        if dtype == "auto":
            dtype = model.dtype if on_gpu else "float32"
        block_size = self.block_size or (64 if on_gpu else 16)
        options: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        decided: dict[str, Any] = {
            "device": self.device if self.device != "auto" else device_type,
            "dtype": dtype,
            "attention_backend": backend,
            "enforce_eager": self.enforce_eager or not on_gpu or backend != "triton",
            "async_scheduling": on_gpu if self.async_scheduling is None else self.async_scheduling,
            "max_num_batched_tokens": self.max_num_batched_tokens or (8192 if on_gpu else 2048),
            "block_size": block_size,
            "max_model_len": self._resolve_max_model_len(model, dtype, block_size, on_gpu),
            "num_kv_blocks": self.num_kv_blocks or 0,
            "quantization": self._resolve_quantization(model, on_gpu),
        }
        if self.speculative_config is not None:
            decided |= self._resolve_speculation(self.speculative_config, on_gpu)
        resolved = ResolvedConfig(**{**options, **decided})
        resolved._check_against(model, on_gpu)
        return resolved

    def _resolve_quantization(
        self, model: ModelConfig, on_gpu: bool
    ) -> Literal["fp8", "int8"] | None:
        """The caller's, or the checkpoint's, which cannot be another."""
        stored = model.quantization.method if model.quantization is not None else None
        wanted = self.quantization or stored
        if stored not in (None, wanted):
            raise ConfigError(
                f"quantization={wanted!r}, but the checkpoint is quantized to {stored} already."
                " Leave quantization out, or load the checkpoint that is not quantized."
            )
        if wanted == "fp8" and not on_gpu:
            logger.warning(
                "fp8 weights are converted at every step on a CPU, which is slow; %s.",
                "quantization='int8' is fast" if stored is None else "an int8 checkpoint is fast",
            )
        return wanted

    def _resolve_speculation(self, wanted: SpeculativeConfig, on_gpu: bool) -> dict[str, Any]:
        """What speculative decoding decides: its own fields, and that no step runs ahead."""
        if self.async_scheduling:
            raise ConfigError(
                "async_scheduling=True plans a step before the tokens of the previous one are"
                " known, and a proposal follows known tokens. Leave async_scheduling or"
                " speculative_config out."
            )
        limit = wanted.disable_by_batch_size or (64 if on_gpu else 8)
        count = wanted.num_speculative_tokens or NUM_SPECULATIVE_TOKENS
        resolved = dataclasses.replace(
            wanted, disable_by_batch_size=limit, num_speculative_tokens=count
        )
        return {"async_scheduling": False, "speculative_config": resolved}

    def _resolve_max_model_len(
        self, model: ModelConfig, dtype: str, block_size: int, on_gpu: bool
    ) -> int:
        """The model's length; on a CPU no more than fits into the cache of one sequence."""
        if self.max_model_len is not None or on_gpu or self.num_kv_blocks is not None:
            return self.max_model_len or model.max_model_len
        # The ranks on a CPU share its memory, and each holds at least one KV head.
        kv_heads = max(model.num_key_value_heads, self.tensor_parallel_size)
        token_bytes = kv_bytes_per_token(model, dtype, self.kv_cache_dtype, kv_heads)
        fits = max(CPU_SEQUENCE_BYTES // (token_bytes * block_size), 1) * block_size
        if fits < model.max_model_len:
            logger.warning(
                "max_model_len is %d here, not the model's %d: the KV cache of one such sequence "
                "would take %.2f GiB. Set max_model_len or num_kv_blocks to have more.",
                fits,
                model.max_model_len,
                model.max_model_len * token_bytes / 2**30,
            )
        return min(fits, model.max_model_len)


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(EngineConfig):
    """The config that an engine runs with: every option has a value. See `EngineConfig.resolve`."""

    max_model_len: int
    max_num_batched_tokens: int
    block_size: int
    #: 0 until the model is loaded. Then the runner knows how many blocks fit.
    num_kv_blocks: Annotated[int, Range(0)]
    async_scheduling: bool

    def _check_against(self, model: ModelConfig, on_gpu: bool) -> None:
        if self.max_model_len > model.max_model_len:
            raise ConfigError(f"max_model_len={self.max_model_len} is beyond {_longest(model)}")
        if self.attention_backend == "triton":
            self._check_triton(on_gpu)
        if self.calculate_kv_scales and self.kv_cache_dtype != "fp8":
            raise ConfigError(
                "calculate_kv_scales=True belongs to kv_cache_dtype='fp8', and kv_cache_dtype is"
                f" {self.kv_cache_dtype!r}. Leave it out: int8 measures the scale of each token."
            )
        heads = model.num_attention_heads
        kv_heads = model.num_key_value_heads
        width = model.intermediate_size
        size = self.tensor_parallel_size
        if not _splits(size, heads, kv_heads, width):
            fits = [n for n in range(1, min(heads, 1024) + 1) if _splits(n, heads, kv_heads, width)]
            raise ConfigError(
                f"tensor_parallel_size={size} does not divide this model of {heads} query heads,"
                f" {kv_heads} KV heads and intermediate_size {width}; possible:"
                f" {', '.join(map(str, fits))}."
            )

    def _check_triton(self, on_gpu: bool) -> None:
        if self.block_size < 16 or self.block_size & (self.block_size - 1):
            raise ConfigError(
                f"block_size={self.block_size}: the Triton kernels need a power of two of at least"
                " 16; attention_backend='torch' takes any size."
            )
        if on_gpu:
            return
        if self.dtype != "float32":
            raise ConfigError(
                "Triton's interpreter on a CPU computes right in float32 only; set dtype='float32'."
            )
        if self.kv_cache_dtype == "fp8":
            raise ConfigError(
                "Triton's interpreter on a CPU cannot do float8; set kv_cache_dtype='int8', or"
                " attention_backend='torch'."
            )
        if importlib.util.find_spec("triton") is None:
            raise ConfigError(
                "attention_backend='triton' needs Triton (Linux only: pip install"
                " 'minivllm[triton]'); attention_backend='torch' runs everywhere."
            )
        if os.environ.get("TRITON_INTERPRET", "").lower() not in ("1", "true", "on", "yes", "y"):
            raise ConfigError(
                "attention_backend='triton' on a CPU runs in Triton's interpreter: set the"
                " environment variable TRITON_INTERPRET=1 before Python starts, or use"
                " attention_backend='torch'."
            )


@dataclass(frozen=True, init=False)
class EngineArgs(EngineConfig):
    """A model and the options of its engine, under vLLM's name.

    Use: `LLMEngine.from_engine_args(EngineArgs(model=...))`. The fields are `model` (None, a
    directory or a hub id) and those of `EngineConfig`. ``EngineArgs(...)`` accepts and refuses the
    same options as ``LLM(...)``. ``LLM(**dataclasses.asdict(args))`` makes the engine that `args`
    describes.
    """

    model: str | Path | None = None

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        checked = EngineConfig.from_options(options)
        for field in dataclasses.fields(checked):
            object.__setattr__(self, field.name, getattr(checked, field.name))
        object.__setattr__(self, "model", model)

    @property
    def options(self) -> dict[str, Any]:
        """All fields except the model, as keyword arguments of ``LLM(model, ...)``."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(EngineConfig)}


def _longest(model: ModelConfig) -> str:
    """Complete "max_model_len is beyond …": the model's longest sequence, and what to do."""
    rope = model.rope
    if rope.rope_type == "default":
        return (
            f"the {model.max_model_len} positions of the checkpoint's config; lower it, or set rope"
            " scaling in config.json."
        )
    if rope.rope_type == "llama3":
        return (
            f"the {model.max_model_len} positions of the checkpoint's config, rope scaling"
            " included; lower it."
        )
    length = (
        rope.original_max_position if rope.rope_type == "yarn" else model.max_position_embeddings
    )
    return (
        f"the {model.max_model_len} positions that the checkpoint's config allows: {length},"
        f" stretched {rope.factor:g} times by its rope scaling ({rope.rope_type}). Lower it, or"
        " raise that factor in config.json."
    )


def _splits(size: int, heads: int, kv_heads: int, width: int) -> bool:
    """Whether a model can be split evenly over this number of ranks."""
    return not heads % size and not width % size and (not kv_heads % size or not size % kv_heads)
