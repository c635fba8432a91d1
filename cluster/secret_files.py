"""Files that hold secrets: made once, replaced whole, readable by their owner alone. Knows nothing of what they hold."""

from __future__ import annotations

import os
import pathlib
import secrets

from cluster.errors import ConfigError


def create_once(path: pathlib.Path, data: bytes) -> None:
    """Of several processes that start together, one creates the file and all read it whole."""
    unfinished = _write_beside(path, data)
    try:
        os.link(unfinished, path)
    except FileExistsError:
        pass
    finally:
        unfinished.unlink()


def replace_whole(path: pathlib.Path, data: bytes) -> None:
    """A reader sees the old bytes or the new ones; what was written outlives a crash of the machine."""
    os.replace(_write_beside(path, data), path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_private(path: pathlib.Path) -> None:
    """Raises ConfigError where anybody but the owner can read or change the file."""
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"{path}: others can read this key; run: chmod 600 {path}")


def _write_beside(path: pathlib.Path, data: bytes) -> pathlib.Path:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return unfinished
