"""The file of votes: a line of JSON an answer, only ever added to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from apt_hooks.errors import AptError
from apt_hooks.files import make_folder


@dataclasses.dataclass(frozen=True)
class Vote:
    """An answer.

    Attributes:
        rater: a name, or an id.
        prompt, seed: the item; `prompt` counts from 0.
        text: the prompt, as the rater read it.
        criterion: which question.
        shown: the methods, from left to right.
        chosen: one of them; None: cannot tell.
        time: UTC, ISO 8601.
    """

    rater: str
    prompt: int
    text: str
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
    """Of several answers of a rater to the same question, the last."""
    return list({vote.question: vote for vote in votes}.values())


def read_votes(path: Path) -> list[Vote]:
    """All lines of a file of votes, in order; the piece of a line at its end, which a crash left, is no vote.

    Raises:
        AptError: the file cannot be read, or has another line that is no vote.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AptError(f"{path}: cannot be read: {error.strerror}") from error
    lines = content.split(b"\n")
    votes = []
    for number, line in enumerate(lines, start=1):
        if not line and number == len(lines):
            break
        try:
            votes.append(_parse(line))
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise AptError(
                f"{path}: line {number} is no vote; found {line[:40].decode(errors='replace')!r}: name the file that "
                "`apt-hooks compare` wrote, or take the line out"
            ) from error
    return votes


def _parse(line: bytes) -> Vote:
    found = json.loads(line)
    vote = Vote(**{**found, "shown": tuple(found["shown"])})
    kinds = {"rater": str, "prompt": int, "text": str, "seed": int, "criterion": str, "time": str}
    for name, kind in kinds.items():
        if type(getattr(vote, name)) is not kind:
            raise TypeError(f"{name} is no {kind.__name__}")
    if vote.chosen is not None and vote.chosen not in vote.shown:
        raise ValueError(f"{vote.chosen!r} was not shown")
    return vote


class VoteFile:
    """Adds votes to a file, made where it is missing, each on the disk before `add` returns; `close` it.

    Raises:
        AptError: as `read_votes`; the file cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        make_folder(path.parent)
        try:
            self._handle: int | None = os.open(
                path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666
            )
        except OSError as error:
            raise AptError(f"{path}: cannot be written to: {error.strerror}") from error
        try:
            self._last = {vote.question: vote for vote in read_votes(path)}
            self._mend(path.read_bytes())
        except BaseException:
            self.close()
            raise

    def _mend(self, content: bytes) -> None:
        """After a crash in the middle of a line, which nobody was told is saved, begin a new one."""
        if not content or content.endswith(b"\n") or self._handle is None:
            return
        *_, piece = content.split(b"\n")
        try:
            _parse(piece)
        except (ValueError, KeyError, TypeError):
            os.ftruncate(self._handle, len(content) - len(piece))
        else:
            os.write(self._handle, b"\n")

    def add(self, vote: Vote) -> None:
        """Add a line.

        Raises:
            AptError: it cannot be written; then the file is what it was.
        """
        line = json.dumps(dataclasses.asdict(vote), ensure_ascii=False).encode() + b"\n"
        with self._lock:
            if self._handle is None:
                raise AptError(f"{self.path}: is closed")
            before = os.fstat(self._handle).st_size
            try:
                if os.write(self._handle, line) < len(line):
                    raise OSError(0, "the disk is full")
                os.fsync(self._handle)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._handle, before)
                raise AptError(f"{self.path}: a vote cannot be written: {error.strerror}") from error
            self._last[vote.question] = vote

    def answers(self, rater: str) -> dict[tuple[int, int, str], Vote]:
        """What a rater has answered last, by prompt, seed and criterion."""
        with self._lock:
            return {vote.question[1:]: vote for vote in self._last.values() if vote.rater == rater}

    @property
    def votes(self) -> list[Vote]:
        """The votes that count: each rater's last ones."""
        with self._lock:
            return list(self._last.values())

    def close(self) -> None:
        """May be called again."""
        with self._lock:
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None
