"""What a newcomer installs: cheap imports, the floors of the house, and a wheel that brings its model along.

The wheel goes into a virtual environment that holds nothing but it; the dependencies are lent by a .pth file that
points at this environment's site-packages, since installing torch once more takes minutes. That the wheel's own
requirements suffice is shown by .ci/run, which installs it with them into an empty environment.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from minivllm.bundled import BUNDLED_MODEL_PATH

ROOT = Path(__file__).resolve().parents[1]
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
HEAVY = ("torch", "transformers", "triton", "matplotlib", "huggingface_hub", "IPython", "jupyter_client", "tokenizers")

has_model = pytest.mark.skipif(
    not (BUNDLED_MODEL_PATH / "model.safetensors").is_file(), reason="the bundled model is not in this checkout"
)


@pytest.mark.parametrize("module", ["minivllm", "minivllm.cli", "minivllm.bundled", "minivllm.viz", "minivllm.doctor"])
def test_imports_are_cheap(module):
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


def test_every_floor_imports_only_from_below():
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    arguments = ["--no-cache", "--no-logo", "--config", str(ROOT / "pyproject.toml")]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 kept, 0 broken" in result.stdout


def test_constraints_pin_every_requirement_and_name_no_place():
    text = (ROOT / "constraints.txt").read_text()
    pins = {m.group(1).lower().replace("_", "-"): m.group(2) for m in re.finditer(r"^([\w.-]+)==([\w.]+)", text, re.M)}
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(pins)
    assert not re.search(r"://|file:| @ |^-", text, re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    for requirement in required:
        name = re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")
        assert name in pins or name == "minivllm", f"{requirement} has no pin"
        minimum = re.search(r">=([\d.]+)", requirement)
        if minimum and name in pins:
            pinned, least = ([int(x) for x in version.split(".")] for version in (pins[name], minimum.group(1)))
            assert pinned >= least, requirement


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of what git tracks or would add: no leftovers of this checkout get in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(
        [
            "git",
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
            "-z",
            "--",
            "minivllm",
            "*.toml",
            "*.md",
            "LICENSE",
        ],
        cwd=ROOT,
        capture_output=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(out), str(source)], check=True, timeout=240)
    (built,) = out.glob("minivllm-*-py3-none-any.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].split("-")[0] for name in names} == {"minivllm"}
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "minivllm").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert ours - {name for name in names if name.endswith(".py")} == set()
    assert any(name.endswith("entry_points.txt") for name in names)
    assert any("LICENSE" in name for name in names)


@has_model
def test_the_wheel_holds_the_bundled_model(wheel):
    infos = {info.filename: info for info in zipfile.ZipFile(wheel).infolist()}
    for name in MODEL_FILES:
        assert infos[f"minivllm/bundled/{name}"].file_size == (BUNDLED_MODEL_PATH / name).stat().st_size
    assert sum(infos[f"minivllm/bundled/{name}"].file_size for name in MODEL_FILES) <= 13e6


@has_model
def test_the_installed_wheel_generates_from_its_own_model(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    bin_dir = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    scheme = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
    site = Path(sysconfig.get_path("purelib", "venv", vars=scheme))
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(bin_dir / "python"),
        "install",
        "-q",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*install, str(wheel)], check=True, timeout=120)
    # Appended to the path, so the wheel's files come first; an editable finder of this environment is not followed.
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}

    def run(*command: str) -> str:
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    python = str(bin_dir / "python")
    assert run(python, "-c", "import minivllm; print(minivllm.__file__)").startswith(str(site))
    text = run(str(bin_dir / "minivllm"), "generate", "-t", "0", "-n", "24", "Tell me a story about a fox named Pip.")
    assert len(text.split()) >= 5
