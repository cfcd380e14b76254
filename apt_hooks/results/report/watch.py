"""`apt-hooks watch`: a training's log as it grows, in the terminal."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections import deque
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from apt_hooks.errors import AptError
from apt_hooks.results.read_steplog import ENDING, LoggedStep, RunLog, check_next, parse_line, read_run, run_name
from apt_hooks.training.steplog import VALUES

from .curves import fold_bins, timesteps_of
from .summary import fixed, number

INTERVAL = 1.0  # seconds between two looks at the log
LOOK_FOR_OTHERS = 5.0  # seconds between two looks for newer logs in a folder
RATE_OVER = 60.0  # seconds that the rate is a mean of
HISTORY = 2000  # values that a sparkline is made from; more are halved


_SHOWN = {
    "delta_noise": "delta noise",
    "loss_tuned": "loss, LoRA",
    "loss_frozen": "loss, base",
    "loss_weight": "loss factor",
    "augmented": "augmented",
}
_MOST_BINS = 20
_OTHER_LINES = 13  # than those of the bins
_BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_LOW, _HIGH = (58, 145, 205), (222, 72, 48)  # colors of gamma 0 and 1, to be seen on dark and on light


def run_watch(place: Path, *, once: bool = False, console: Any = None) -> None:
    """Show a run's gammas, losses and speed in the terminal while its log grows, until Ctrl-C.

    Args:
        place: a step log, or a folder, of which the newest log is shown that is not broken; neither needs to be there
            yet.
        once: show what there is and return, as is done where the output is no terminal; of a folder then the newest log
            that has a step.
        console: rich's; None makes one.

    Raises:
        AptError: rich is missing; the log is broken, or all of a folder are; with `once`, there is none with a step.
    """
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError as error:
        raise AptError(f'watching needs rich ({error}): pip install "apt-hooks[report]"') from error

    console = console or Console()
    watched = Watched(place)
    with contextlib.suppress(KeyboardInterrupt):
        watched.look()
        if once or not console.is_terminal:
            while watched.last is None and watched.others and watched.path is not None:
                watched.leave_out(watched.path, f"{watched.path}: {watched.waiting_for()}")
                watched.look()
            if watched.last is None:
                left_out = watched.left_out.values()
                wrong = "" if place.exists() else f"; name a RUN{ENDING}, or a folder that has some"
                raise AptError("; ".join([*left_out, f"{watched.path or place}: {watched.waiting_for()}{wrong}"]))
            console.print(picture(watched, console.width, None))
            return
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(picture(watched, console.width, console.height), refresh=True)
                time.sleep(INTERVAL)
                watched.look()


class History:
    """The course of a value over a whole run in a bounded list: once it is full, two neighbours become their mean."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._each, self._sum, self._count = 1, 0.0, 0

    def add(self, value: float, steps: int = 1) -> None:
        """The next value, which stands for so many steps; NaN is none."""
        if math.isnan(value):
            return
        self._each = max(self._each, steps)
        self._sum, self._count = self._sum + value * steps, self._count + steps
        if self._count >= self._each:
            self.values.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0
        if len(self.values) >= HISTORY:
            self.values = [(a + b) / 2 for a, b in zip(self.values[::2], self.values[1::2], strict=True)]
            self._each *= 2


class Watched:
    """What is known of a run whose log may grow, be replaced, or not be there yet.

    Attributes:
        path: the log; None while a folder has none.
        others: further logs of the folder.
        left_out: those of the folder that are not shown, and why; a broken one until it is written to again.
        start: what the log says of the run where it started last; empty for older logs.
        last: its last step; None while there is none.
        histories: by the names in `VALUES`.
        written: when the log was written to last.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.path: Path | None = None
        self.others: list[Path] = []
        self.left_out: dict[Path, str] = {}
        self._left_at: dict[Path, float] = {}
        self._looked = -math.inf
        self._forget()

    def _forget(self) -> None:
        self.start: dict[str, Any] = {}
        self.last: LoggedStep | None = None
        self.histories = {name: History() for name in VALUES}
        self.written: datetime | None = None
        self._file = (0, 0)  # device and inode
        self._end = self._lines = 0
        self._times: deque[tuple[float, int]] = deque()  # when which step was seen first

    def look(self) -> None:
        """Take in what has been written since the last look.

        Raises:
            AptError: a new line is none of a step log, or the log cannot be read; of a folder's log, where there is no
                other.
        """
        while True:
            self._find()
            if self.path is None:
                return
            try:
                self._look_at(self.path)
                return
            except AptError as error:
                if not self.others:
                    raise AptError("; ".join([*self.left_out.values(), str(error)])) from error
                self.leave_out(self.path, str(error))

    def leave_out(self, path: Path, why: str) -> None:
        """Pass over a log of the folder as it is now."""
        self.left_out[path] = why
        self._left_at[path] = _modified(path)
        self._looked = -math.inf  # for another
        self._forget()

    def _look_at(self, path: Path) -> None:
        try:
            found = path.stat()
            if (found.st_dev, found.st_ino) != self._file or found.st_size < self._end:
                self._forget()  # another run has begun there
                self._file = (found.st_dev, found.st_ino)
            if found.st_size > self._end:
                self.written = datetime.fromtimestamp(found.st_mtime)
                self._read(path)
        except FileNotFoundError:
            self._forget()
        except OSError as error:
            raise AptError(f"{path}: cannot be read: {error.strerror}") from error
        if self.last is not None and (not self._times or self._times[-1][1] != self.last.step):
            now = time.monotonic()
            self._times.append((now, self.last.step))
            while len(self._times) > 2 and now - self._times[0][0] > RATE_OVER:  # a step may take longer than that
                self._times.popleft()

    def waiting_for(self) -> str:
        """What is not there yet."""
        if self.path is not None and self.path.exists():
            return "no step yet; a run writes a line a step"
        if self.place.is_dir():
            return f"no *{ENDING} here yet, which a run with APT writes beside its LoRA"
        return "no such file or folder yet"

    def rate(self) -> float | None:
        """Steps a second: as seen here, or at first by the log's own times; None where neither tells."""
        if len(self._times) > 1:
            (since, first), (until, last) = self._times[0], self._times[-1]
            return (last - first) / (until - since)
        return self._rate_by_log()

    def _rate_by_log(self) -> float | None:
        if self.last is None or self.written is None:
            return None
        try:
            started = datetime.fromisoformat(str(self.start.get("started")))
        except ValueError:
            return None
        steps = self.last.step - self.start.get("resumed_from", 0)
        seconds = self.written.timestamp() - started.timestamp()
        return steps / seconds if seconds > 0 and steps > 0 else None

    def _find(self) -> None:
        """Choose the log: of a folder the newest."""
        if not self.place.is_dir():
            self.path = self.place
            return
        now = time.monotonic()
        # The place itself: what was to be a file has become a folder.
        if self.path not in (None, self.place) and now - self._looked < LOOK_FOR_OTHERS:
            return
        self._looked = now
        logs = sorted(self.place.rglob(f"*{ENDING}"), key=_modified, reverse=True)
        self.left_out = {log: why for log, why in self.left_out.items() if _modified(log) == self._left_at[log]}
        logs = [log for log in logs if log not in self.left_out]
        self.path, self.others = (logs[0], logs[1:]) if logs else (None, [])

    def _read(self, path: Path) -> None:
        if self._end == 0:
            run = read_run(path)
            if run is not None:
                self._take_over(run)
            return
        with path.open("rb") as file:
            file.seek(self._end)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # not whole yet
                self._add(path, line)
                self._end += len(line)

    def _take_over(self, run: RunLog) -> None:
        """A log that was there before: of a long one a part is read, as for the report."""
        self._end, self._lines = run.end, run.lines
        self.start = run.about
        for name, history in self.histories.items():
            for value in run.values[name].tolist():
                history.add(value, run.every)
        values = [float(run.values[name][-1]) for name in VALUES]
        gammas, gaps, seen = (rows[-1].tolist() for rows in (run.gammas, run.gaps, run.seen))
        self.last = LoggedStep(int(run.steps[-1]), gammas, gaps, seen, values)

    def _add(self, path: Path, line: bytes) -> None:
        self._lines += 1
        found = parse_line(path, self._lines, line)
        if isinstance(found, dict):
            self.start = found
            return
        if self.last is not None:
            check_next(path, self._lines, self.last, found)
        self.last = found
        for name, value in zip(VALUES, found.values, strict=True):
            self.histories[name].add(value)


def _modified(path: Path) -> float:
    with contextlib.suppress(FileNotFoundError):  # a run that begins anew replaces it
        return path.stat().st_mtime
    return -math.inf


def picture(watched: Watched, width: int, height: int | None) -> Any:
    """A rich renderable of what is known of the run, for so many columns and lines; None: as many as it needs."""
    from rich.console import Group
    from rich.text import Text

    last = watched.last
    if last is None or watched.path is None:
        path = watched.path or watched.place
        return Text(f"waiting for {path}: {watched.waiting_for()} (Ctrl-C ends)", overflow="fold")
    lines = [
        Text(run_name(watched.path), style="bold").append(f"  {_settings(watched.start)}", style="not bold dim"),
        Text(str(watched.path), style="dim"),
        Text(f"step {last.step}", style="bold").append(f"  {_speed(watched)}", style="not bold"),
        Text(""),
        Text("gamma by timesteps: 0 as good as the base, 1 overfitted", style="dim"),
        *_bars(last, width, _MOST_BINS if height is None else max(1, height - _OTHER_LINES - len(watched.left_out))),
        Text(""),
    ]
    values = dict(zip(VALUES, last.values, strict=True))
    shown = {name: title for name, title in _SHOWN.items() if watched.histories[name].values}
    for name, title in shown.items():
        course = sparkline(watched.histories[name].values, max(5, width - 25))
        lines.append(Text(f"{title:<12} ").append(course, style="cyan").append(f" {number(values[name]):>9}"))
    if watched.others:
        names = ", ".join(run_name(path) for path in watched.others)
        lines.append(Text(f"also here: {names}", style="dim"))
    lines += [Text(f"left out: {why}", style="dim") for why in watched.left_out.values()]
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    lines[0].no_wrap = height is not None  # without a screen to keep to, all of the settings
    return Group(*lines)


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of a value from 0 up to its largest mean, in at most so many characters."""
    count = min(width, len(values))
    ends = [i * len(values) // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(ends)]
    top = max(means)
    return "".join(_BLOCKS[max(0, min(7, int(8 * mean / top)))] if top > 0 else _BLOCKS[0] for mean in means)


def _bars(last: LoggedStep, width: int, most: int) -> list[Any]:
    from rich.text import Text

    gammas = torch.tensor([last.gamma], dtype=torch.float64).masked_fill(~torch.tensor([last.seen]), math.nan)
    folded, groups = fold_bins(gammas, min(most, _MOST_BINS))
    rows = [
        *zip(timesteps_of(groups, len(last.gamma)), folded[0].tolist(), strict=True),
        ("mean", float(gammas.nanmean())),
    ]
    longest, lines = max(5, width - 16), []
    for name, value in rows:
        line = Text(f"{name:>8} ")
        if math.isnan(value):
            lines.append(line.append("not seen yet", style="dim"))
            continue
        filled = round(longest * value)
        color = ",".join(str(round(a + (b - a) * value)) for a, b in zip(_LOW, _HIGH, strict=True))
        line.append("\u2588" * filled, style=f"rgb({color})").append("\u2591" * (longest - filled), style="dim")
        lines.append(line.append(f" {fixed(value)}"))
    return lines


def _settings(start: dict[str, Any]) -> str:
    if not start:
        return "config not in the log"
    overrides = [f"{key} = {json.dumps(value)}" for key, value in start.get("overrides", {}).items()]
    preset = f"preset {start['preset']}" if start.get("preset") else "no preset"
    resumed = [f"resumed behind step {start['resumed_from']}"] if start.get("resumed_from") else []
    return ", ".join([preset, *(overrides or ["no overrides"]), *resumed])


def _speed(watched: Watched) -> str:
    rate, parts = watched.rate(), []
    if rate is not None:
        parts.append(f"{rate:.1f} steps/s" if rate >= 1 else f"{60 * rate:.1f} steps/min")
    if watched.written is not None:
        parts.append(f"last line {_ago(time.time() - watched.written.timestamp())} ago")
    return ", ".join(parts)


def _ago(seconds: float) -> str:
    seconds = max(0, round(seconds))
    if seconds < 120:
        return f"{seconds} s"
    minutes = seconds // 60
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h"
