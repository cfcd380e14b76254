"""What the commands `patch`, `unpatch` and `status` know of a trainer; its `patch` module is one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Change:
    """What a command did, or would do.

    Attributes:
        path: where.
        diff: of the files; empty where nothing had to change in them.
        changed: whether something was written, be it a copy without a difference.
    """

    path: Path
    diff: str
    changed: bool


class Status(Protocol):
    """What is at a place."""

    @property
    def version(self) -> str:
        """As the place itself says, or "unknown"."""
        ...

    @property
    def patched(self) -> bool:
        """Whether all of it is patched, by this version of apt-hooks."""
        ...


class Trainer(Protocol):
    """A module of a trainer's."""

    NAME: str
    TESTED: tuple[str, ...]
    """Versions that were tested; others are taken by their structure, and told."""

    SCRIPTS_OF_PRESET: Mapping[str, tuple[str, ...]]
    """The scripts that train the models of a preset, for what is told to a user; nothing is decided by them."""

    OPTIONS: frozenset[str]
    """Those of the command `patch` that `apply` takes."""

    def status(self, path: Path, /) -> Status:
        """What is there."""
        ...

    @property
    def apply(self) -> Callable[..., Change]:
        """Inserts the lines, at a path, with `dry_run` and `OPTIONS`."""
        ...

    def unpatch(self, path: Path, /, *, dry_run: bool) -> str:
        """Take them out again; the diff."""
        ...

    def patched_copy(self, path: Path, /) -> Path | None:
        """A patched copy beside what is not patched itself, which a user may mean."""
        ...

    def named(self, found: Any, /) -> str:
        """The trainer with its version, for a `Status` of its own; which are tested, where this one is not."""
        ...

    def report(self, path: Path, found: Any, /) -> list[str]:
        """What `status` prints."""
        ...
