"""Write files safely: check the place before the work, and never leave half a file."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from minivllm.errors import ConfigError


def require_writable(path: str | Path, what: str, make_folder: bool = False) -> None:
    """Raise `ConfigError` if a file cannot be written at `path`. Call this before the work.

    what: the subject of the message, such as "The trace". make_folder: make the folder if it is
    missing.
    """
    path, target = Path(path), _target(path)
    refused = f"{what} cannot be written to {path}:"
    try:
        if make_folder:
            target.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.isdir(target.parent):
            raise ConfigError(
                f"{refused} there is no folder {target.parent}. Make it, or name another."
            )
        if os.path.isdir(target):
            raise ConfigError(f"{refused} that is a folder. Name a file in it.")
        if os.path.exists(target):
            if not os.access(target, os.W_OK):
                raise ConfigError(f"{refused} no permission. Name another file.")
        else:
            # Only an attempt shows whether the folder can be written to.
            with target.open("x"):
                pass
            target.unlink()
    except OSError as error:
        raise ConfigError(f"{refused} {reason(error)}.") from error


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file through a temporary file beside it: readers see the old content or the new.

    Raises OSError and then keeps the old content. Where no file can be made beside it (a pipe,
    /dev/stdout, a read-only folder), the content is written directly.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    target = _target(path)
    plain = target.is_file() and os.access(target.parent, os.W_OK)
    if os.path.exists(target) and (_is_device(target) or not plain):
        target.write_bytes(data)
        return
    beside = target.with_name(f".{target.name[:100]}.{os.getpid()}")
    try:
        beside.write_bytes(data)
        if plain:
            beside.chmod(target.stat().st_mode & 0o777)
        beside.replace(target)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


def reason(error: OSError) -> str:
    """The cause of an error in the system's words, such as "No space left on device"."""
    return error.strerror or str(error) or type(error).__name__


def _target(path: str | Path) -> Path:
    """The target of a symbolic link, so that writing keeps the link."""
    return Path(path) if _is_device(Path(path)) else Path(os.path.realpath(path))


def _is_device(path: Path) -> bool:
    """Whether the path stands for an open device or pipe, as /dev/stdout does."""
    return path.parts[:2] in (("/", "dev"), ("/", "proc"))
