"""The lines about a run's checkpoints, read again."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import AptError
from ..training.checkpoint_drifts import Drifts
from ..training.checkpoints import ENDING


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A line of a run's checkpoints; NaN for null.

    Attributes:
        step: how many steps it was trained.
        file: its name, from the lines' folder on.
        gamma, gap, held_out_gap: means over the bins that were seen.
        bins, unseen: how many there are, and how many of them were not.
        delta_noise: mean over the last steps before it.
        class_drift, free_drift, prompt_response, text_drift: as `training.checkpoint_drifts` measures them.
        stop: which part of the run's rule held; None: none did.
    """

    step: int
    file: str
    gamma: float
    gap: float
    held_out_gap: float
    bins: int
    unseen: int
    delta_noise: float
    class_drift: float
    free_drift: float
    prompt_response: float
    text_drift: float
    stop: str | None = None

    @property
    def drifts(self) -> dict[str, float]:
        """Those that were measured, by name."""
        return {name: value for name in Drifts.NAMES if not math.isnan(value := getattr(self, name))}


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """A run's checkpoints, by their steps, and what the file says of all of them."""

    name: str
    path: Path
    about: dict[str, Any]
    checkpoints: list[Checkpoint]

    def gone(self) -> frozenset[int]:
        """The steps of the checkpoints whose files are not beside the lines: trainers delete older ones."""
        return frozenset(one.step for one in self.checkpoints if not (self.path.parent / one.file).exists())


def find_runs(place: Path, left_out: list[str] | None = None) -> list[SavedRun]:
    """The runs of a folder and below it, or the one whose lines the file has.

    Args:
        place: the folder, or the file.
        left_out: where given, takes what is wrong with the runs whose lines are broken, beside others.

    Raises:
        AptError: no such place, no lines there, or broken ones (with `left_out`, in all of the runs).
    """
    if place.is_dir():
        # Not NAME-checkpoints.1.jsonl, which is of an earlier run.
        paths = sorted(place.rglob(f"*{ENDING}"))
        if not paths:
            raise AptError(
                f"{place}: looked for *{ENDING}, which a run with APT writes beside the LoRAs that it saves; found none"
            )
    elif place.exists():
        if not place.match("*-checkpoints*.jsonl"):  # an earlier run's has a number in its name
            raise AptError(f"{place}: is no RUN{ENDING}; name that, or the folder that a run has saved its LoRAs in")
        paths = [place]
    else:
        raise AptError(f"{place}: no such folder; name the one that a run has saved its LoRAs in")
    runs, broken = [], []
    for path in paths:
        try:
            runs.append(read_checkpoints(path))
        except AptError as error:
            broken.append(str(error))
    if broken and (left_out is None or not runs):
        raise AptError("; ".join(broken))
    if left_out is not None:
        left_out += broken
    return runs


def read_checkpoints(path: Path) -> SavedRun:
    """Read the lines; of a step that was saved twice, as by a resumed run, the later one counts.

    Raises:
        AptError: it cannot be read, or has a line that is none of a checkpoint.
    """
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise AptError(f"{path}: cannot be read: {error.strerror}") from error
    about: dict[str, Any] = {}
    found: dict[int, Checkpoint] = {}
    for number, text in enumerate(texts[:-1], 1):  # behind the last line's end nothing, or the piece of a line
        try:
            line = json.loads(text)
            if "run" in line:
                about = dict(line["run"])
            else:
                checkpoint = _checkpoint(line)
                found[checkpoint.step] = checkpoint
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise AptError(
                f"{path}: line {number} is none of a checkpoint, with step and gamma; found {text[:40]!r}: name the "
                f"RUN{ENDING} that a run writes beside its LoRAs, or take that line out"
            ) from error
    name = path.name.removesuffix(ENDING)
    return SavedRun(name, path, about, [found[step] for step in sorted(found)])


def _checkpoint(line: dict[str, Any]) -> Checkpoint:
    gammas = line["gamma"]
    return Checkpoint(
        step=int(line["step"]),
        file=str(line["file"]),
        gamma=_mean(gammas),
        gap=_mean(line["gap"]),
        held_out_gap=_mean(line.get("held_out_gap") or []),
        bins=len(gammas),
        unseen=sum(gamma is None for gamma in gammas),
        delta_noise=_number(line["delta_noise"]),
        class_drift=_number(line.get("class_drift")),
        free_drift=_number(line.get("free_drift")),
        prompt_response=_number(line.get("prompt_response")),
        text_drift=_number(line.get("text_drift")),
        stop=line.get("stop"),
    )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _mean(values: Sequence[Any]) -> float:
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan
