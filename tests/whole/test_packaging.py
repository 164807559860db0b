"""What a newcomer installs: cheap imports, the floors of the house, and a wheel that brings its
model along.

The wheel goes into a virtual environment that holds nothing but it; the dependencies are lent by a
.pth file that points at this environment's site-packages, since installing torch once more takes
minutes. That the wheel's own requirements suffice is shown by .ci/run: there, its environment has
only what they lead to.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from minivllm.bundled import BUNDLED_DRAFT_PATH, BUNDLED_MODEL_PATH

ROOT = Path(__file__).resolve().parents[2]
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
HEAVY = (
    "torch",
    "transformers",
    "triton",
    "matplotlib",
    "huggingface_hub",
    "IPython",
    "jupyter_client",
    "tokenizers",
)

has_model = pytest.mark.skipif(
    not (BUNDLED_MODEL_PATH / "model.safetensors").is_file(),
    reason="the bundled model is not in this checkout",
)


@pytest.mark.parametrize(
    "module",
    ["minivllm", "minivllm.cli.app", "minivllm.bundled", "minivllm.viz", "minivllm.cli.doctor"],
)
def test_imports_are_cheap(module):
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"


def test_every_floor_imports_only_from_below():
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    arguments = ["--no-cache", "--no-logo", "--config", str(ROOT / "pyproject.toml")]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " kept, 0 broken" in result.stdout


def test_constraints_pin_every_requirement_and_name_no_place():
    text = (ROOT / "constraints.txt").read_text()
    pins = {
        m.group(1).lower().replace("_", "-"): m.group(2)
        for m in re.finditer(r"^([\w.-]+)==([\w.]+)", text, re.M)
    }
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(pins)
    assert not re.search(r"://|file:| @ |^-", text, re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    for requirement in required:
        name = re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")
        assert name in pins or name == "minivllm", f"{requirement} has no pin"
        minimum = re.search(r">=([\d.]+)", requirement)
        if minimum and name in pins:
            pinned, least = (
                [int(x) for x in version.split(".")] for version in (pins[name], minimum.group(1))
            )
            assert pinned >= least, requirement


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _brought_by(extra: str) -> set[str]:
    """The distributions that pyproject.toml names for an extra, its own extras followed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names, extras = set(), [extra]
    lines = [*project["dependencies"]]
    while extras:
        lines += project["optional-dependencies"][extras.pop()]
        for line in lines:
            if own := re.match(r"minivllm\[([\w,]+)\]", line):
                extras += own.group(1).split(",")
            else:
                names.add(_normal(re.match(r"[\w.-]+", line).group()))
        lines = []
    return names


def _sources(path: Path) -> Iterator[str]:
    """A module's text, or a notebook's cells without the lines that are IPython's and not
    Python's.
    """
    if path.suffix == ".py":
        yield path.read_text()
        return
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            yield re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", "".join(cell["source"]))


def _third_party_imports(path: Path) -> set[str]:
    modules = set()
    for source in _sources(path):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module)
    return {name.partition(".")[0] for name in modules} - sys.stdlib_module_names - {"minivllm"}


COURSE = ("notebooks", "exercises", "solutions", "minivllm/course", "minivllm/viz")


@pytest.mark.slow
@pytest.mark.parametrize("folder", COURSE)
def test_lab_brings_all_that_the_course_imports(folder):
    distributions, brought = metadata.packages_distributions(), _brought_by("lab")
    files = [f for f in (ROOT / folder).rglob("*") if f.suffix in (".py", ".ipynb")]
    files = [f for f in files if ".ipynb_checkpoints" not in f.parts and ".kept-" not in f.name]
    imports = {name: file.name for file in files for name in _third_party_imports(file)}
    assert imports, f"nothing is imported in {folder}"
    lacking = {
        name: file
        for name, file in imports.items()
        if not brought & {_normal(d) for d in distributions.get(name, [name])}
    }
    assert lacking == {}


def test_lab_brings_what_the_options_of_pytest_need():
    """`pytest --nbval exercises/…` after `make lab`: addopts names options of nbval, and `timeout`
    is a plugin's.
    """
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert "--nbval" in options["addopts"]
    assert "timeout" in options
    assert _brought_by("lab") >= {"pytest", "nbval", "pytest-timeout"}
    assert _brought_by("dev") >= _brought_by("lab")


def _make(tmp_path: Path, *arguments: str) -> str:
    """What `make` would run in a fresh checkout, without running it."""
    if shutil.which("make") is None:
        pytest.skip("there is no make here")
    environment = {
        "PATH": os.environ["PATH"]
    }  # and none of the variables of a `make` that runs this test
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    command = ["make", "-n", *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("target", "extra"), [("demo", "."), ("lab", ".[lab]"), ("site", ".[site]"), ("test", ".[dev]")]
)
def test_make_installs_the_same_pins_with_pip_and_with_uv(tmp_path, target, extra):
    pip = _make(tmp_path, target, "UV=", f"PYTHON={sys.executable}")
    uv = _make(tmp_path, target, "UV=/bin/uv", f"PYTHON={sys.executable}")
    assert f"{sys.executable} -m venv .venv" in pip
    assert f"/bin/uv venv -q --seed --allow-existing --python {sys.executable} .venv" in uv
    wanted = f"-c constraints.txt -e '{extra}'" if extra != "." else "-c constraints.txt -e ."
    assert f".venv/bin/python -m pip install --disable-pip-version-check {wanted}" in pip
    assert f"/bin/uv pip install --python .venv/bin/python {wanted}" in uv
    assert "uv pip" not in pip
    assert "uv venv" not in pip


def test_make_fetches_a_python_by_uv_where_there_is_none(tmp_path):
    assert "--python '>=3.11' .venv" in _make(tmp_path, "demo", "UV=/bin/uv", "PYTHON=")


def test_make_hands_pips_settings_to_uv(tmp_path):
    (tmp_path / "show.mk").write_text("include Makefile\nshow:\n\t+@env | grep '^UV_'\n")
    settings = ("PIP_INDEX_URL=a", "PIP_EXTRA_INDEX_URL=b", "PIP_FIND_LINKS=c")
    shown = _make(tmp_path, "-f", "show.mk", "show", "UV=/bin/uv", *settings).splitlines()
    assert {"UV_DEFAULT_INDEX=a", "UV_INDEX=b", "UV_FIND_LINKS=c"} <= set(shown)
    assert "UV_INDEX_STRATEGY=unsafe-best-match" in shown


@pytest.mark.parametrize("uv", ["", "/bin/uv"])
def test_make_test_newest_has_no_pins_and_an_environment_of_its_own(tmp_path, uv):
    shown = _make(tmp_path, "test-newest", f"UV={uv}", f"PYTHON={sys.executable}", "ARGS=-k one")
    newest = ".venv-newest-{}.{}".format(*sys.version_info)
    assert f"{newest}/bin/python -m pytest --nbval -n logical" in shown
    assert f"install{f' --python {newest}/bin/python' if uv else ''}" in shown
    assert "--upgrade" in shown
    assert "constraints.txt" not in shown
    assert ".venv/" not in shown.replace(sys.executable, "")
    assert shown.rstrip().endswith("-k one")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of what git tracks or would add: no leftovers of this checkout
    get in.
    """
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
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
    ]
    subprocess.run([*command, "-w", str(out), str(source)], check=True, timeout=240)
    (built,) = out.glob("minivllm-*-py3-none-any.whl")
    return built


@pytest.mark.slow
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


@pytest.mark.slow
@has_model
def test_the_wheel_holds_the_bundled_model(wheel):
    infos = {info.filename: info for info in zipfile.ZipFile(wheel).infolist()}
    for name in MODEL_FILES:
        assert (
            infos[f"minivllm/bundled/{name}"].file_size
            == (BUNDLED_MODEL_PATH / name).stat().st_size
        )
    assert sum(infos[f"minivllm/bundled/{name}"].file_size for name in MODEL_FILES) <= 13e6
    drafts = {name.name: name.stat().st_size for name in BUNDLED_DRAFT_PATH.iterdir()}
    for name, size in drafts.items():
        assert infos[f"minivllm/bundled/draft/{name}"].file_size == size
    assert {*MODEL_FILES, "README.md"} <= set(drafts)
    assert sum(drafts.values()) <= 2e6


@pytest.mark.slow
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
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}
    subprocess.run([*install, str(wheel)], check=True, timeout=120, env=environment)
    # Appended to the path, so the wheel's files come first; an editable finder of this environment
    # is not followed.
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(*command: str) -> str:
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    python = str(bin_dir / "python")
    assert run(python, "-c", "import minivllm; print(minivllm.__file__)").startswith(str(site))
    text = run(
        str(bin_dir / "minivllm"),
        "generate",
        "-t",
        "0",
        "-n",
        "24",
        "Tell me a story about a fox named Pip.",
    )
    assert len(text.split()) >= 5
