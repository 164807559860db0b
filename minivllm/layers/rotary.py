"""Rotary position embedding (Su et al., RoFormer, 2021, arXiv 2104.09864): the table of angles.

Dimension pair i of a head is rotated by ``position * frequency[i]``. The frequencies depend on the
checkpoint's rope type; the rotation itself is the kernel `qk_norm_rope`. Taught in
notebooks/06_qwen3.ipynb."""

import math

import torch

from minivllm.config import RopeConfig


def rope_table(
    rope: RopeConfig, head_dim: int, max_position: int, device: torch.device
) -> torch.Tensor:
    """[max_position, head_dim] float32: the cosines of all pairs, then their sines, for each
    position.
    """
    if device.type == "meta":
        # Only its size is asked for, perhaps of a model that is too large for this machine.
        return torch.empty(max_position, head_dim, dtype=torch.float32, device=device)
    frequencies, scale = rope_frequencies(rope, head_dim)
    # Computed on the CPU, so that every device rotates by the same angles.
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32, device="cpu"), frequencies)
    return (torch.cat([angles.cos(), angles.sin()], dim=-1) * scale).to(device)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """[head_dim / 2] float32 radians per position, and the factor on cosine and sine, which only
    YaRN has (else 1).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.rope_type == "linear":
        return frequencies / rope.factor, 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, frequencies), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, frequencies, head_dim)
    return frequencies, 1.0


def _llama3(rope: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Long waves are stretched by `factor`, short ones are kept, those between are blended (the
    reference code of Llama 3.1).
    """
    waves_in_context = rope.original_max_position * frequencies / (2 * math.pi)
    blend = (waves_in_context - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blend = blend.clamp(0.0, 1.0)
    return frequencies * blend + frequencies / rope.factor * (1.0 - blend)


def _yarn(rope: RopeConfig, frequencies: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al., 2023, arXiv 2309.00071, section 3): dimensions that rotate often are kept,
    those that rotate rarely are stretched, with a ramp between two numbers of rotations.
    """

    def dimension_with(rotations: float) -> float:
        waves = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(waves) / (2 * math.log(rope.theta))

    low, high = dimension_with(rope.beta_fast), dimension_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (
        (high - low) or 0.001
    )
    keep = 1.0 - ramp.clamp(0.0, 1.0)
    scale = rope.attention_factor
    if scale is None:
        scale = _yarn_mscale(
            rope.factor, rope.mscale if rope.mscale and rope.mscale_all_dim else 1.0
        )
        if rope.mscale and rope.mscale_all_dim:
            scale /= _yarn_mscale(rope.factor, rope.mscale_all_dim)
    return frequencies / rope.factor * (1.0 - keep) + frequencies * keep, scale


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0
