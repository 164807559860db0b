"""The operations an engine is made of, each as a Triton kernel and as plain torch.

`Kernels` is the seam: an engine holds one instance and hands it to its layers, so a learner's own
function, a Triton kernel and the torch reference are interchangeable, and two engines with
different kernels can live side by side in one process. To try your own SwiGLU:
``LLM(kernels=dataclasses.replace(Kernels.reference(), silu_mul=mine))``.

One file per operation. Each holds, from top to bottom: the formula and its cost, the reference, the
kernel and its launcher. cpu.py holds what is faster than the references on a CPU.
"""

from collections.abc import Callable
from dataclasses import InitVar, dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from minivllm.kernels import (
    activation,
    flash_attention,
    kv_cache,
    norm,
    online_softmax,
    paged_attention,
    rotary,
)
from minivllm.kernels import cpu as cpu_kernels
from minivllm.kernels import linear as linear_kernels
from minivllm.kernels import quantized as quantized_kernels
from minivllm.kernels import sampling as sampling_kernels
from minivllm.kernels.rotary import NormRope


@dataclass(frozen=True)
class Fused:
    """What an implementation does in one launch where `Kernels` has two operations."""

    #: qk_norm_rope and store_kv; as `Kernels.qk_norm_rope_store`
    qk_norm_rope_store: Callable
    merge_attention: Callable  # with a third argument, the dtype of the result


@dataclass(frozen=True)
class Kernels:
    """One implementation of every operation. Signatures are those of the `*_reference` functions.

    Shapes: T tokens of the step, B sequences, H query heads, KH key/value heads, D head_dim, V
    vocabulary. Caches are ``[num_blocks, KH, block_size, D]``: tensors of the model's dtype or,
    with the engine option kv_cache_dtype, `QuantizedCache` objects. Prefill is attention of any
    number of new tokens, decode of one.

    fused: what is done in fewer launches than operation by operation. `dataclasses.replace` drops
    it, so that the operation that you put in place of another is called. To keep it, where the
    replaced one is no part of it: ``replace(k, rms_norm=mine, fused=k.fused_operations)``.
    """

    name: str  # for reports; nothing depends on it
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
    #: As linear, with a weight of 8 bits and its scale: (x, weight, scale, bias | None) -> [T, N].
    #: W8A8 quantizes x as well, to e4m3.
    linear_w8a16: Callable = quantized_kernels.linear_w8a16_reference
    linear_w8a8: Callable = quantized_kernels.linear_w8a8_reference
    #: (weight, scale) -> the weight in the form that linear_w8a16 reads. Called once per layer.
    pack_w8a16: Callable = quantized_kernels.unpacked
    #: Whether no operation waits for the host, so that a CUDA graph can record them.
    can_be_recorded: bool = False
    fused: InitVar[Fused | None] = None
    fused_operations: Fused | None = field(init=False, repr=False)

    def __post_init__(self, fused: Fused | None) -> None:
        object.__setattr__(self, "fused_operations", fused)

    def qk_norm_rope_store(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        given: NormRope,
        cache: tuple[kv_cache.Cache, kv_cache.Cache],
        slot_mapping: Tensor,
    ) -> Tensor:
        """`qk_norm_rope`, then `store_kv` of the keys and of value -> query. cache: k_cache and
        v_cache.
        """
        if self.fused_operations is not None:
            return self.fused_operations.qk_norm_rope_store(
                query, key, value, given, cache, slot_mapping
            )
        query, key = self.qk_norm_rope(query, key, *given)
        self.store_kv(key, value, *cache, slot_mapping)
        return query

    def merge_into(self, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
        """`merge_attention` for a decode_attention that returns dtype: of that dtype where it costs
        nothing, else float32.
        """
        if self.fused_operations is not None:
            return partial(self.fused_operations.merge_attention, dtype=dtype)
        return self.merge_attention

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
    def cpu(onednn: frozenset[cpu_kernels.Shape] = frozenset()) -> "Kernels":
        """What is fastest in torch on a CPU. onednn: the shapes of weight that oneDNN multiplies
        (`cpu.choose_onednn`).
        """
        return replace(
            Kernels.reference(),
            name="cpu",
            decode_attention=cpu_kernels.PlannedAttention().decode_attention,
            store_kv=cpu_kernels.store_kv,
            qk_norm_rope=cpu_kernels.qk_norm_rope,
            linear=partial(cpu_kernels.linear, onednn=onednn),
            linear_w8a16=cpu_kernels.linear_w8a16,
            pack_w8a16=cpu_kernels.pack_w8a16,
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
            linear_w8a16=quantized_kernels.linear_w8a16,
            linear_w8a8=quantized_kernels.linear_w8a8,
            can_be_recorded=True,
            fused=Fused(rotary.qk_norm_rope_store, online_softmax.merge_attention),
        )
