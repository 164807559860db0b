"""Run the command `minivllm` as `python -m minivllm`."""

from minivllm.cli.app import app

if __name__ == "__main__":
    app(prog_name="minivllm")
