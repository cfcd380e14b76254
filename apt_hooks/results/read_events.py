"""Losses that trainers log for TensorBoard, by which a run without APT can stand beside one with it."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt_hooks.errors import AptError

from .read_steplog import ENDING, RunLog, steps_ahead

PATTERN = "*events.out.tfevents.*"
_LOSSES = "loss/"
_BY_EPOCH = "epoch_"  # begins the last part of what sd-scripts logs by the epoch's number
_STEPS = "loss/current"  # what it logs in every step
_OWN = "apt/loss_tuned"  # what a run with APT logs beside
_TRACKER = "network_train"  # the folder that sd-scripts' tracker makes in its logging_dir, of no meaning in a name


@dataclasses.dataclass(frozen=True)
class TrainerLog:
    """What a trainer logged of one run.

    Attributes:
        name: what to call it beside other runs.
        folder: where its event files are.
        scalars: [lines] steps of training and values, by the tags that begin with `loss/`.
        own: the same of the loss that a run with APT logs beside; empty where it had none.
    """

    name: str
    folder: Path
    scalars: dict[str, tuple[Tensor, Tensor]]
    own: tuple[Tensor, Tensor]

    def agreement(self, run: RunLog) -> tuple[float, int]:
        """Of the steps that a step log has too, the share that has the same loss there, and by how many its steps are
        ahead of the trainer's, which counts from 1 again where it is resumed."""
        logged = dict(zip(run.steps.tolist(), run.values["loss_tuned"].float().tolist(), strict=True))
        found = []
        for ahead in dict.fromkeys([0, *map(steps_ahead, run.starts)]):
            own = zip(*map(Tensor.tolist, self.own), strict=True)
            pairs = [(value, logged.get(step + ahead, math.nan)) for step, value in own]
            same = [math.isclose(one, other, rel_tol=1e-6) for one, other in pairs if one == one and other == other]
            found.append((sum(same) / max(1, len(same)), ahead))
        return max(found, key=lambda share_and_ahead: share_and_ahead[0])

    def later(self, steps: int) -> TrainerLog:
        """The same, its steps counted from an earlier one on."""
        return dataclasses.replace(self, scalars={tag: (at + steps, v) for tag, (at, v) in self.scalars.items()})


def find_events(places: Sequence[Path]) -> dict[Path, Path]:
    """Folders with event files in and below places, each of one run, and the place of each; a file is a place too."""
    found: dict[Path, Path] = {}
    for place in places:
        files = place.rglob(PATTERN) if place.is_dir() else [place] if place.match(PATTERN) else []
        found |= {folder: place for folder in sorted({file.parent.resolve() for file in files}) if folder not in found}
    return found


def has_events_alone(place: Path) -> bool:
    """Whether a place has event files, and no step log."""
    return bool(find_events([place])) and not (place.is_dir() and any(place.rglob(f"*{ENDING}")))


def read_events(folders: Mapping[Path, Path]) -> list[TrainerLog]:
    """The losses of runs, of those of `find_events` that have any.

    What was logged by the epoch's number stands at the step that the training had come to by then.

    Raises:
        AptError: the package tensorboard is missing.
    """
    if not folders:
        return []
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise AptError(
            f"{', '.join(map(str, folders))}: event files are read by the package tensorboard ({error}): "
            "pip install tensorboard"
        ) from error
    logs = []
    for folder in folders:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: all of them
        events.Reload()
        tags = events.Tags()["scalars"]
        clock = [(event.wall_time, event.step) for event in events.Scalars(_STEPS)] if _STEPS in tags else []
        losses = [tag for tag in tags if tag.startswith(_LOSSES)]
        scalars = {tag: _column(events.Scalars(tag), clock if _by_epoch(tag) else []) for tag in losses}
        own = _column(events.Scalars(_OWN) if _OWN in tags else [], [])
        logs.append(TrainerLog(str(folder), folder, scalars, own))
    logs = [log for log in logs if log.scalars]
    found = [folders[log.folder] for log in logs]
    names = [
        _name(log.folder if found.count(place) > 1 else place, place) for log, place in zip(logs, found, strict=True)
    ]
    names = [name if names.count(name) == 1 else str(log.folder) for name, log in zip(names, logs, strict=True)]
    return [dataclasses.replace(log, name=name) for name, log in zip(names, logs, strict=True)]


def _name(folder: Path, place: Path) -> str:
    """The place's, and what of the folder lies below it."""
    top = (place if place.is_dir() else place.parent).resolve()
    parts = folder.resolve().relative_to(top).parts if folder.is_dir() else ()
    named = top.parent if top.name == _TRACKER else top
    return "/".join([named.name, *(part for part in parts if part != _TRACKER)])


def _by_epoch(tag: str) -> bool:
    return tag.rpartition("/")[2].startswith(_BY_EPOCH)


def _column(events: Sequence[Any], clock: Sequence[tuple[float, int]]) -> tuple[Tensor, Tensor]:
    """Steps and values, NaN for what is no finite number; with a clock, times and steps, at the last step by then."""
    times = [time for time, _ in clock]
    steps = [clock[max(0, bisect.bisect_right(times, e.wall_time) - 1)][1] if clock else e.step for e in events]
    values = torch.tensor([e.value for e in events], dtype=torch.float64)
    return torch.tensor(steps, dtype=torch.long), values.masked_fill(~values.isfinite(), math.nan)
