"""Votes, as a rater's page saves them: a line of JSON an answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apt_hooks.errors import AptError

from .folders import Comparison
from .rating_plan import picture_ids


@dataclasses.dataclass(frozen=True)
class Vote:
    """An answer.

    Attributes:
        rater: a name.
        prompt, seed: the item; `prompt` counts from 0.
        criterion: which question.
        shown: the methods, from left to right.
        chosen: one of them; None: cannot tell.
        time: UTC, ISO 8601.
    """

    rater: str
    prompt: int
    seed: int
    criterion: str
    shown: tuple[str, ...]
    chosen: str | None
    time: str

    @property
    def question(self) -> tuple[str, int, int, str]:
        """What is answered, by whom: a later answer replaces an earlier one."""
        return self.rater, self.prompt, self.seed, self.criterion


def last_votes(votes: Iterable[Vote]) -> list[Vote]:
    """Of several answers of a rater to the same question, the last in time."""
    return list({vote.question: vote for vote in sorted(votes, key=lambda vote: vote.time)}.values())


def read_votes(files: Sequence[Path], comparison: Comparison) -> dict[Path, list[Vote]]:
    """The votes in each of the files that raters have saved.

    Args:
        comparison: of the pictures that the page was made of.

    Raises:
        AptError: a file cannot be read, or has a line that is no vote, or one on other pictures.
    """
    methods = {name: where for where, name in picture_ids(comparison).items()}
    return {path: _read(path, methods) for path in files}


def _read(path: Path, methods: Mapping[str, tuple[int, int, str | None]]) -> list[Vote]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise AptError(f"{path}: cannot be read: {error.strerror}") from error
    votes = []
    for number, line in enumerate(lines, start=1):
        try:
            found = _checked(json.loads(line))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise AptError(
                f"{path}: line {number} is no vote; found {line[:40].decode(errors='replace')!r}: name the file that a "
                "rater's page saved, or take the line out"
            ) from error
        shown = [methods.get(name) for name in found["shown"]]
        known = [where for where in shown if where is not None and where[2] is not None]
        if len(known) < len(shown) or len({where[:2] for where in known}) > 1:
            raise AptError(
                f"{path}: line {number} is a vote on other pictures than these; name the folders, and --methods, that "
                "its page was made of"
            )
        (prompt, seed, _), *_ = known
        of = {name: method for name, (*_, method) in zip(found["shown"], known, strict=True)}
        chosen = None if found["chosen"] is None else of[found["chosen"]]
        votes.append(
            Vote(found["rater"], prompt, seed, found["criterion"], tuple(map(str, of.values())), chosen, found["time"])
        )
    return votes


def _checked(found: Any) -> dict[str, Any]:
    """A line's values; raises ValueError, KeyError or TypeError where it is no vote."""
    shown = found["shown"]
    if not isinstance(shown, list) or len({*shown}) != len(shown) or len(shown) < 2:
        raise ValueError("no two pictures")
    if not all(isinstance(found[name], str) for name in ("rater", "criterion", "time")):
        raise TypeError("no text")
    if found["chosen"] is not None and found["chosen"] not in shown:
        raise ValueError("not shown")
    return dict(found)
