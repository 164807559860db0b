"""Qwen2 and Qwen2.5: the decoder of qwen3.py without a norm on the heads, with biases on Q, K
and V.

config.json does not mention these biases: every Qwen2 has them, and none on the output of
attention."""

import dataclasses

from minivllm.config import LayerOptions
from minivllm.models.config_fields import ConfigFields
from minivllm.models.qwen3 import Qwen3ForCausalLM


class Qwen2ForCausalLM(Qwen3ForCausalLM):
    """`Qwen3ForCausalLM` without QK-norm, with biases on Q, K and V."""

    @staticmethod
    def read_layer_options(read: ConfigFields) -> LayerOptions:
        options = Qwen3ForCausalLM.read_layer_options(read)
        return dataclasses.replace(options, qkv_bias=True, o_bias=False, qk_norm=False)
