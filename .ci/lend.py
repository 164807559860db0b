"""Lend a fresh environment what a wheel requires and nothing else: by links, not by an install.

`python lend.py WHEEL TARGET`, with the Python of an environment that has more than the wheel needs.
TARGET is the site-packages of the fresh one. Packages that no requirement of the wheel leads to
stay out, so that an import of one fails there, as it would after `pip install WHEEL`.
"""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from email import message_from_bytes
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement


def required(lines: list[str], extras: frozenset[str], found: dict[str, Distribution]) -> None:
    """Add to found, by name, what these lines of requirements lead to."""
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            continue
        key = f"{requirement.name}[{','.join(sorted(requirement.extras))}]"
        if key not in found:
            found[key] = distribution(requirement.name)
            assert requirement.specifier.contains(found[key].version, prereleases=True), requirement
            required(found[key].requires or [], frozenset(requirement.extras), found)


def lend(package: Distribution, target: Path) -> None:
    home = Path(str(package.locate_file("")))
    for file in package.files or []:
        source = home / file
        if ".." in file.parts or not source.is_file():  # a command in bin/
            continue
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        if not (target / file).exists():
            try:
                os.link(source, target / file)
            except OSError:
                shutil.copy2(source, target / file)


def main(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])
    found: dict[str, Distribution] = {}
    required(lines, frozenset(), found)
    for package in found.values():
        lend(package, target)
    print(f"lent: {', '.join(sorted({package.name for package in found.values()}))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
