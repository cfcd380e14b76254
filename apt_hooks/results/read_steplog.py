"""Step logs read for looking at: found in folders, and of a long one an evenly chosen part."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import math
import os
import re
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apt_hooks.errors import AptError
from apt_hooks.training.checkpoints import ENDING as CHECKPOINTS
from apt_hooks.training.steplog import VALUES

ENDING = "-apt.jsonl"
MOST_LINES = 20_000  # a log of up to so many steps is read whole; half a second of parsing
MOST_BYTES = 50_000_000  # and not more than this, which hundreds of bins could need
_OF_CHECKPOINTS = re.compile(
    CHECKPOINTS.removesuffix(".jsonl") + r"((?:\.\d+)?\.jsonl)$"
)  # an earlier run's has a number
_STEP = b'{"step"'  # how `StepLog` begins the line of a step


class LoggedStep(NamedTuple):
    """The line of a step; NaN for null, and for what an older log does not have."""

    step: int
    gamma: list[float]
    gap: list[float]
    seen: list[bool]  # of each bin, whether its gamma means something: it is 0, too, where a bin has no gap
    values: list[float]  # in the order of VALUES


@dataclasses.dataclass(frozen=True)
class RunLog:
    """A step log, or an evenly chosen part of it.

    Attributes:
        name: what to call it beside the other runs.
        path: the log.
        starts: what the log says of the run itself, at its beginning and wherever it was resumed; none in older logs.
        steps: [lines], the numbers of the steps that were read.
        gammas, gaps: [lines, bins]; a gap is NaN for a bin not seen yet, or whose loss was no number.
        seen: [lines, bins], whether a gamma means something: it is 0, too, where a bin has no gap.
        values: [lines] by the names in `VALUES`; NaN for null.
        total: how many steps the log has.
        every: every so manieth of them was read, and the last.
        lines: how many whole lines the log has, and `end`: how many bytes these are.
        written: when the log was last written to.
    """

    name: str
    path: Path
    starts: list[dict[str, Any]]
    steps: Tensor
    gammas: Tensor
    gaps: Tensor
    seen: Tensor
    values: dict[str, Tensor]
    total: int
    every: int
    lines: int
    end: int
    written: datetime.datetime

    @property
    def about(self) -> dict[str, Any]:
        """What the log says of the run where it was started last; empty in older logs."""
        return self.starts[-1] if self.starts else {}

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that it was started with last; empty in older logs."""
        config: dict[str, Any] = self.about.get("config", {})
        return config

    @property
    def resumptions(self) -> list[int]:
        """The steps behind which the run was resumed."""
        return resumptions(self.starts)


def find_logs(places: Sequence[Path]) -> dict[str, Path]:
    """Step logs by a name for each: the places themselves, and all `*-apt.jsonl` in and below those that are folders.

    Raises:
        AptError: a place that does not exist, a folder without a log, or no place at all.
    """
    if not places:
        raise AptError("no run is named: give a RUN-apt.jsonl, or a folder that has some")
    found: dict[Path, Path] = {}
    for place in places:
        if place.is_dir():
            logs = sorted(place.rglob(f"*{ENDING}"))
            if not logs:
                raise AptError(f"{place}: has no *{ENDING}, which a run with APT writes beside its LoRA")
        elif place.exists():
            logs = [place]
        else:
            raise AptError(f"{place}: no such file or folder; name a RUN{ENDING}, or a folder that has some")
        found |= {log.resolve(): log for log in logs if log.resolve() not in found}
    names = [run_name(path) for path in found]
    if len(set(names)) < len(names):
        top = Path(os.path.commonpath([path.parent for path in found]))
        names = [(path.parent.relative_to(top) / run_name(path)).as_posix() for path in found]
    return dict(zip(names, found.values(), strict=True))


def run_name(path: Path) -> str:
    """The name that a trainer gave to the run of a log."""
    return path.name.removesuffix(ENDING) if path.name != ENDING else path.stem


def read_run(path: Path, name: str | None = None, most: int = MOST_LINES) -> RunLog | None:
    """Read a step log; what a run that goes on has not finished at its end is left out.

    Args:
        path: the jsonl file.
        name: see `RunLog`; None takes the file's.
        most: of a log with more steps than this, every 2nd, 4th, ... is read, so that this many suffice.

    Returns:
        None for a log that has no step yet.

    Raises:
        AptError: it cannot be read, a line that is read is none of a step log, or its name says that it has none.
    """
    check_no_checkpoints(path)
    chosen = _Chosen(path, most)
    try:
        with path.open("rb", buffering=1 << 18) as file:
            written = os.fstat(file.fileno()).st_mtime
            while lines := file.readlines(1 << 19):
                chosen.add(lines)
    except OSError as error:
        raise AptError(f"{path}: cannot be read: {error.strerror}; name a RUN{ENDING}") from error
    steps = chosen.parse()
    if not steps:
        return None
    return RunLog(
        name=name or run_name(path),
        path=path,
        starts=chosen.starts,
        steps=torch.tensor([step.step for step in steps]),
        gammas=_table([step.gamma for step in steps]),
        gaps=_table([step.gap for step in steps]),
        seen=torch.tensor([step.seen for step in steps]),
        values=dict(zip(VALUES, _table([step.values for step in steps]).unbind(1), strict=True)),
        total=chosen.total,
        every=chosen.every,
        lines=chosen.lines,
        end=chosen.end,
        written=datetime.datetime.fromtimestamp(written),
    )


def check_no_checkpoints(path: Path) -> None:
    """Raises AptError where the file has a run's checkpoints, whose lines look like those of steps."""
    if _OF_CHECKPOINTS.search(path.name) and path.is_file():
        log = path.with_name(_OF_CHECKPOINTS.sub(ENDING.removesuffix(".jsonl") + r"\1", path.name))
        way = f"name {log}" if log.exists() else f"name the RUN{ENDING} of that run"
        raise AptError(f"{path}: has lines about checkpoints, for `apt-hooks pick`, and none of steps; {way}")


def parse_line(path: Path, number: int, text: bytes) -> LoggedStep | dict[str, Any]:
    """A line of a step log: a step, or what is said of a run where it starts.

    Raises:
        AptError: it is neither; `path` and `number` (of the line) are for its message.
    """
    try:
        line = json.loads(text)
        return _step(line) if "step" in line else _start(line["run"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise AptError(
            f"{path}: line {number} is none of a step log, with step and gamma; found "
            f"{text.strip()[:40].decode(errors='replace')!r}: name the RUN{ENDING} that a run writes beside the LoRA"
        ) from error


def check_next(path: Path, number: int, before: LoggedStep, step: LoggedStep) -> None:
    """Raises AptError where a step cannot come after the one before it."""
    if len(step.gamma) != len(before.gamma):
        raise AptError(f"{path}: line {number} has {len(step.gamma)} bins, those before have {len(before.gamma)}")
    if step.step <= before.step:
        raise AptError(
            f"{path}: line {number} is of step {step.step}, one before it of step {before.step}; "
            "have two runs written to it at once? Give each its own output name"
        )


def resumptions(starts: Sequence[dict[str, Any]]) -> list[int]:
    """The steps behind which a run was resumed, from what its log says of its starts."""
    return [start["resumed_from"] for start in starts if start.get("resumed_from")]


def steps_ahead(start: Mapping[str, Any]) -> int:
    """By how many the log's steps are ahead of the trainer's own, in what this start of a run begins."""
    step: int = start.get("resumed_from", 0)
    counted = start.get("trainer_step", step)
    return step - counted if isinstance(counted, int) else 0


class _Chosen:
    """Takes the lines of a log, and keeps every first, second, fourth, ... step, so that `most` suffice.

    In one pass: how long a log is shows at its end, and where one is, it may be growing.
    """

    def __init__(self, path: Path, most: int) -> None:
        self.path = path
        self.starts: list[dict[str, Any]] = []
        self.total, self.every, self.lines, self.end = 0, 1, 0, 0
        self._most = max(2, most)
        self._kept: list[tuple[int, bytes]] = []  # a line's number, and its text
        self._last = (0, b"")

    def add(self, lines: list[bytes]) -> None:
        """The next lines of the file, many at once: there may be a million."""
        if not lines[-1].endswith(b"\n"):
            if not self.lines and len(lines) == 1 and not lines[0].startswith(b"{"):  # nor the piece of a log's line
                parse_line(self.path, 1, lines[0])
            lines = lines[:-1]  # the last of the file, and not whole
        first = 0
        # Whatever does not look like a step is parsed: the starts have to be found, and so does what is broken.
        for i in [i for i, line in enumerate(lines) if not line.startswith(_STEP)]:
            start = parse_line(self.path, self.lines + i - first + 1, lines[i])
            if isinstance(start, dict):
                self._add_steps(lines[first:i])
                self.starts.append(start)
                self.lines += 1
                first = i + 1
        self._add_steps(lines[first:])
        self.end += sum(map(len, lines))

    def _add_steps(self, lines: list[bytes]) -> None:
        if not lines:
            return
        first = -self.total % self.every
        self._kept += zip(itertools.count(self.lines + 1 + first, self.every), lines[first :: self.every], strict=False)
        while len(self._kept) > min(self._most, max(2, MOST_BYTES // len(lines[-1]))):
            self._kept = self._kept[::2]
            self.every *= 2
        self.total += len(lines)
        self.lines += len(lines)
        self._last = (self.lines, lines[-1])

    def parse(self) -> list[LoggedStep]:
        """The steps that were kept, and the last."""
        lines = self._kept
        if lines and lines[-1][0] != self._last[0]:
            lines = [*lines, self._last]
        steps: list[LoggedStep] = []
        for number, text in lines:
            step = parse_line(self.path, number, text)
            assert isinstance(step, LoggedStep)  # for mypy: `add` has taken the starts
            if steps:
                check_next(self.path, number, steps[-1], step)
            steps.append(step)
        return steps


def _step(line: dict[str, Any]) -> LoggedStep:
    step, gamma, gap = line["step"], line["gamma"], line.get("gap")
    if type(step) is not int or not 0 <= step < 2**53 or not gamma:
        raise ValueError(step)
    # An older log has no gaps; there, a bin that was not seen cannot be told from one whose gamma is 0.
    seen = [True] * len(gamma) if gap is None else [value is not None for value in gap]
    gap = [None] * len(gamma) if gap is None else gap
    if len(gap) != len(gamma):
        raise ValueError(f"{len(gap)} gaps, {len(gamma)} gammas")
    return LoggedStep(step, _numbers(gamma), _numbers(gap), seen, _numbers([line.get(name) for name in VALUES]))


def _numbers(found: list[Any]) -> list[float]:
    if not set(map(type, found)) <= {float, int, type(None)}:
        raise TypeError("not a number")
    return [math.nan if value is None else float(value) for value in found]


def _start(about: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(about, dict) or type(about.get("resumed_from", 0)) is not int:
        raise ValueError("no start of a run")
    if not all(isinstance(about.get(part, {}), dict) for part in ("config", "overrides", "dropout")):
        raise ValueError("no config")
    if not isinstance(about.get("sample_prompts", []), list):
        raise ValueError("no prompts")
    return about


def _table(rows: list[list[float]]) -> Tensor:
    flat = array("d")
    for row in rows:
        flat.extend(row)
    table = torch.frombuffer(flat, dtype=torch.float64).view(len(rows), len(rows[0]))
    return table.masked_fill(~table.isfinite(), math.nan)
