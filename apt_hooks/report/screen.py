"""What `apt-hooks watch` shows, for rich: a bar a bin, a sparkline a value."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from apt_hooks.read_steplog import Step, run_name
from apt_hooks.steplog import VALUES

from .summary import fixed, number
from .thin import fold_bins, timesteps_of

if TYPE_CHECKING:
    from .watch import Watched

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
        *_bars(last, width, _MOST_BINS if height is None else max(1, height - _OTHER_LINES)),
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
    for line in lines:
        line.no_wrap, line.overflow = True, "ellipsis"
    return Group(*lines)


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of a value from 0 up to its largest mean, in at most so many characters."""
    count = min(width, len(values))
    ends = [i * len(values) // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(ends)]
    top = max(means)
    return "".join(_BLOCKS[max(0, min(7, int(8 * mean / top)))] if top > 0 else _BLOCKS[0] for mean in means)


def _bars(last: Step, width: int, most: int) -> list[Any]:
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
