"""The operations an engine is made of, each as a Triton kernel and as plain torch.

`Kernels` is the seam: an engine holds one instance and hands it to its layers, so a learner's own
function, a Triton kernel and the torch reference are interchangeable, and two engines with
different kernels can live side by side in one process. To try your own RMSNorm:
``LLM(kernels=dataclasses.replace(Kernels.reference(), rms_norm=mine))``.

One file an operation; each holds the formula, its cost, the kernel, its launcher and the reference.
"""

from collections.abc import Callable
from dataclasses import dataclass

from minivllm.kernels import (
    activation,
    flash_attention,
    kv_cache,
    norm,
    online_softmax,
    paged_attention,
    rotary,
)
from minivllm.kernels import linear as linear_kernels
from minivllm.kernels import sampling as sampling_kernels


@dataclass(frozen=True)
class Kernels:
    """One implementation of every operation. Signatures are those of the `*_reference` functions.

    Shapes: T tokens of the step, B sequences, H query heads, KH key/value heads, D head_dim, V
    vocabulary. Caches are ``[num_blocks, KH, block_size, D]``. Prefill is attention of any number
    of new tokens, decode of one.
    """

    name: str
    #: (query [T, H, D], caches, block_table, query_start_loc, seq_lens, ...) -> [T, H, D]
    prefill_attention: Callable
    #: (query [B, H, D], caches, block_table, seq_lens, ..., merge_attention) -> [B, H, D]
    decode_attention: Callable
    merge_attention: Callable  # (partial outputs [S, B, H, D], log-sum-exps [S, B, H]) -> [B, H, D]
    #: (key [T, KH, D], value, caches, slot_mapping [T]) -> None, writes the caches in place
    store_kv: Callable
    rms_norm: Callable  # (x [T, N], weight [N], eps) -> [T, N]
    add_rms_norm: Callable  # (x, residual, weight, eps) -> (normalised sum, sum)
    #: (query, key, q_weight | None, k_weight | None, cos_sin, positions, eps) -> (query, key)
    qk_norm_rope: Callable
    linear: Callable  # (x [T, K], weight [N, K], bias [N] | None) -> [T, N]
    silu_mul: Callable  # (gate_up [T, 2N]) -> [T, N]
    #: (logits [B, V], temperature, top_k, top_p, min_p, seeds, positions) -> token ids [B]
    sample: Callable
    #: qk_norm_rope and store_kv in one launch; None where they are called one after the other.
    qk_norm_rope_store: Callable | None = None

    def __post_init__(self) -> None:
        parts = (self.qk_norm_rope, self.store_kv)
        if self.qk_norm_rope_store is rotary.qk_norm_rope_store and parts != (
            rotary.qk_norm_rope,
            kv_cache.store_kv,
        ):
            # a part was replaced, and must be called
            object.__setattr__(self, "qk_norm_rope_store", None)

    @staticmethod
    def reference() -> "Kernels":
        """Plain torch; runs everywhere, defines what is right."""
        return Kernels(
            name="torch",
            prefill_attention=flash_attention.prefill_attention_reference,
            decode_attention=paged_attention.decode_attention_reference,
            merge_attention=online_softmax.merge_attention_reference,
            store_kv=kv_cache.store_kv_reference,
            rms_norm=norm.rms_norm_reference,
            add_rms_norm=norm.add_rms_norm_reference,
            qk_norm_rope=rotary.qk_norm_rope_reference,
            linear=linear_kernels.linear_reference,
            silu_mul=activation.silu_mul_reference,
            sample=sampling_kernels.sample_reference,
        )

    @staticmethod
    def triton() -> "Kernels":
        """Triton kernels: compiled on a GPU, interpreted on a CPU when ``TRITON_INTERPRET=1``
        (float32 only).
        """
        return Kernels(
            name="triton",
            prefill_attention=flash_attention.prefill_attention,
            decode_attention=paged_attention.decode_attention,
            merge_attention=online_softmax.merge_attention,
            store_kv=kv_cache.store_kv,
            rms_norm=norm.rms_norm,
            add_rms_norm=norm.add_rms_norm,
            qk_norm_rope=rotary.qk_norm_rope,
            linear=linear_kernels.linear,
            silu_mul=activation.silu_mul,
            sample=sampling_kernels.sample,
            qk_norm_rope_store=rotary.qk_norm_rope_store,
        )
