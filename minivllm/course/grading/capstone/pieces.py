"""The places in the engine that a learner's answers take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A place in the engine that a learner's answer takes.

    name: the piece's name in the report. chapter, answer: the chapter, and the name that the answer
    defines there. own: the package's implementations, as "module:function" or
    "module:Class.method". None of these may be called while the learner's piece is in use.
    """

    name: str
    chapter: str
    answer: str
    own: tuple[str, ...]


def _pair(module: str, *names: str) -> tuple[str, ...]:
    """The kernels with these names: the launcher and the reference of each."""
    return tuple(
        f"minivllm.kernels.{module}:{name}{end}" for name in names for end in ("", "_reference")
    )


def _on_cpu(name: str) -> str:
    return f"minivllm.kernels.cpu:{name}"


def _methods(owner: str, *names: str) -> tuple[str, ...]:
    return tuple(f"minivllm.{owner}.{name}" for name in names)


#: The pieces, in the order of the chapters.
PIECES = (
    Piece("merging softmaxes", "01", "merge_attention", _pair("online_softmax", "merge_attention")),
    Piece(
        "flash attention", "02", "prefill_attention", _pair("flash_attention", "prefill_attention")
    ),
    Piece("writing pages", "03", "store_kv", (*_pair("kv_cache", "store_kv"), _on_cpu("store_kv"))),
    Piece(
        "reading pages",
        "03",
        "decode_attention",
        (
            *_pair("paged_attention", "decode_attention"),
            _on_cpu("PlannedAttention.decode_attention"),
        ),
    ),
    Piece(
        "block manager",
        "04",
        "MyBlockManager",
        _methods(
            "engine.block_manager:BlockManager",
            "allocate",
            "free",
            "find_cached_prefix",
            "register_computed",
        ),
    ),
    Piece(
        "scheduler",
        "05",
        "MyScheduler",
        _methods(
            "engine.scheduler:Scheduler",
            "schedule",
            "schedule_running",
            "schedule_waiting",
            "make_room",
        ),
    ),
    Piece("RMSNorm", "06", "rms_norm", _pair("norm", "rms_norm", "add_rms_norm")),
    Piece(
        "QK-norm and RoPE",
        "06",
        "qk_norm_rope",
        (*_pair("rotary", "qk_norm_rope"), _on_cpu("qk_norm_rope")),
    ),
    Piece("SwiGLU", "06", "silu_mul", _pair("activation", "silu_mul")),
    Piece(
        "model",
        "06",
        "Qwen3",
        _methods("models.qwen3:Qwen3ForCausalLM", "forward", "compute_logits"),
    ),
    Piece("batch", "07", "build_batch", ("minivllm.engine.batch:build_batch",)),
    Piece(
        "sampler",
        "07",
        "sample",
        (*_pair("sampling", "sample"), "minivllm.kernels.sampling:filter_logits"),
    ),
    Piece(
        "text stream",
        "07",
        "TextStream",
        _methods("tokenizer:Detokenizer", "append", "finish", "emit"),
    ),
    Piece(
        "loop",
        "07",
        "MyEngine",
        _methods("engine.llm_engine:LLMEngine", "step", "advance", "add_request"),
    ),
)
KERNELS = (
    "merge_attention",
    "prefill_attention",
    "store_kv",
    "decode_attention",
    "rms_norm",
    "qk_norm_rope",
    "silu_mul",
    "sample",
)
OPTIONS = {
    "block_manager_cls": "MyBlockManager",
    "scheduler_cls": "MyScheduler",
    "model_cls": "Qwen3",
    "build_batch": "build_batch",
}
