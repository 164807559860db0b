"""Llama (2, 3 and later ones of the same shape): the decoder of qwen3.py without a norm on the
heads.

Biases are what config.json says, as in Qwen3."""

import dataclasses

from minivllm.config import LayerOptions
from minivllm.models.config_fields import ConfigFields
from minivllm.models.qwen3 import Qwen3ForCausalLM


class LlamaForCausalLM(Qwen3ForCausalLM):
    """`Qwen3ForCausalLM` without QK-norm."""

    @staticmethod
    def read_layer_options(read: ConfigFields) -> LayerOptions:
        return dataclasses.replace(Qwen3ForCausalLM.read_layer_options(read), qk_norm=False)
