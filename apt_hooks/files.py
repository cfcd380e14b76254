"""Writing files so that a crash leaves the old one or the new one."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import secrets
from pathlib import Path
from typing import Any

from .errors import AptError


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step, keeping its permissions; a link is followed to the file it names.

    Raises:
        AptError: the folder does not exist or may not be written to.
    """
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")

    try:
        mode = path.stat().st_mode & 0o777 if path.exists() else None
        # A new file's mode is the kernel's business: whoever asks for the umask changes it, for all threads.
        created = 0o666 if mode is None else mode
        file = open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, created))  # noqa: SIM115
    except OSError as error:
        raise AptError(f"{path.parent}: cannot be written to: {error.strerror}") from error
    try:
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            temporary.chmod(mode)
        temporary.replace(path)
    except OSError as error:
        raise AptError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def remove_leftovers(path: Path) -> None:
    """Remove what a killed `write_atomically` of this file left beside it."""
    path = path.resolve()
    ours = re.compile(rf"\.{re.escape(path.name)}\.[^.]+\.tmp")
    for left in [found for found in path.parent.glob(".*.tmp") if ours.fullmatch(found.name)]:
        left.unlink(missing_ok=True)


def free_name(path: Path) -> Path:
    """The first of `NAME.1.ext`, `NAME.2.ext` and so on that is no file yet, to keep an earlier run's under."""
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def make_folder(path: Path) -> None:
    """Make a folder where it is missing, and those above it.

    Raises:
        AptError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AptError(f"{path}: cannot be made: {error.strerror}; name another folder") from error


def write_figure(path: Path, figure: Any) -> None:
    """Write a figure of matplotlib as a picture, as `write_atomically` does."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    write_atomically(path, content.getvalue())
