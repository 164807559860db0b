"""Triton for the kernels of a notebook, also where it is not installed.

``from minivllm.course.triton import HAS_TRITON, tl, triton`` gives Triton's own modules. On macOS
and Windows, for which Triton has no wheels, it gives stand-ins: a kernel can be written there, and
launching it raises ImportError with a text that says so.

On a CPU, set ``os.environ["TRITON_INTERPRET"] = "1"`` before this import.
"""

try:
    import triton
    import triton.language as tl

    from minivllm.kernels._interpreter import quicken

    quicken()
    HAS_TRITON = True
except ImportError:
    from minivllm.kernels._triton import tl, triton

    HAS_TRITON = False

__all__ = ["HAS_TRITON", "tl", "triton"]
