"""`python -m minivllm` is the command `minivllm`."""

from minivllm.cli import app

if __name__ == "__main__":
    app(prog_name="minivllm")
