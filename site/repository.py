"""What pyproject.toml and the package say about the project."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def version() -> str:
    return _project()["version"]


def repository_url() -> str:
    """The repository's address, without a slash at the end; "" where pyproject.toml has none."""
    urls = {name.lower(): url for name, url in _project().get("urls", {}).items()}
    names = ("repository", "source", "homepage")
    return next((urls[name].rstrip("/") for name in names if name in urls), "")


def url_of(path: str) -> str:
    """The address of a file or folder of the repository; "" without an address of that."""
    url = repository_url()
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"{url}/{kind}/main/{path}" if url else ""
