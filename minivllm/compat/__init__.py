"""What vLLM has and minivllm lacks, by name, each with what to do instead.

A script written for vLLM should either work after its import was changed or say what it lacks.
Nothing is ignored in silence. `options` has the engine options; `calls` has the sampling
parameters, the arguments of `LLM.generate` and `LLM.chat`, and the methods of `LLM`.
"""
