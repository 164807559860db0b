"""Which model families run: a name in `architectures` of config.json -> the class that computes it.

One line per family. A family says itself what its config.json leaves open, in
`read_layer_options`."""

from minivllm.errors import UnsupportedModelError
from minivllm.models.llama import LlamaForCausalLM
from minivllm.models.qwen2 import Qwen2ForCausalLM
from minivllm.models.qwen3 import Qwen3ForCausalLM
from minivllm.validation import shown

MODELS: dict[str, type[Qwen3ForCausalLM]] = {
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "LlamaForCausalLM": LlamaForCausalLM,
}


def model_class(architecture: object) -> type[Qwen3ForCausalLM]:
    """The class of this architecture. Raises `UnsupportedModelError`, which lists the supported
    ones, for any other name.
    """
    if isinstance(architecture, str) and architecture in MODELS:
        return MODELS[architecture]
    raise UnsupportedModelError(
        f"Architecture {shown(architecture)} is none of the supported {', '.join(MODELS)}."
    )
