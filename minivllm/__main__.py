"""`python -m minivllm` is the command `minivllm`."""

from minivllm.cli.app import app

if __name__ == "__main__":
    app(prog_name="minivllm")
