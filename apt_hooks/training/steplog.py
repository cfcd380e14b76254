"""The step log: one line of JSON an optimizer step, numbers fetched from the device once and late."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..errors import AptError
from ..files import free_name, write_atomically
from .step import AptStep

VALUES = (
    "loss_tuned",
    "loss_frozen",
    "loss_weight",
    "augmented",
    "l_mu",
    "l_sigma",
    "l_attn",
    "l_joint",
    "l_offset",
    "delta_noise",
)

logger = logging.getLogger("apt_hooks")


@dataclasses.dataclass
class _Batch:
    gammas: Tensor
    gaps: Tensor
    instances: int
    values: dict[str, Tensor]
    augmented: int
    device: torch.device


class StepLog:
    """Writes `step`, `gamma` and `gap` (lists, as its last batch used them) and `VALUES` as jsonl; null: was none.

    A step's line is written when the next one begins, or at `flush`, so that the device is not waited for in the middle
    of a step. Before the first one, and again where a run was resumed, stands a line with the one key `run`. A log with
    steps of an earlier run that are not continued is kept as `NAME.1.jsonl` and so on.

    Args:
        path: the file; None keeps the last line for `latest` and writes nothing.
        about: what `run` holds beside `loaded` and `started` (local times: of this object, of the first step's end),
            `resumed_from` (a step, in a resumed run) and `trainer_step` (see `trainer_counts`).

    Attributes:
        then: called with each line, as soon as its numbers are known.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.path = path
        self.then: Callable[[dict[str, Any]], None] = lambda line: None
        self._about = {**about, "loaded": _now()}
        self._batches: list[_Batch] = []
        self._ended: tuple[int, int, Tensor] | None = None  # the step, its bins, and gammas, gaps and VALUES in one
        self._latest: dict[str, Any] | None = None
        self._started = False

    def add_about(self, name: str, value: Any) -> None:
        """Have `run` hold this too; to be called before the first step's line is written."""
        self._about[name] = value

    def add(self, step: AptStep, augmented: int) -> None:
        """One batch, `augmented` of its samples moved; several batches make a step under gradient accumulation."""
        # Not the step itself: it holds on to the graph.
        self._batches.append(
            _Batch(step.gammas, step.gaps, step.instances, step.values, augmented, step.prediction.device)
        )

    def end_step(self, number: int) -> None:
        """The batches added since the last call are optimizer step `number`, counted from 1.

        Where a process group is up, values are over the samples of all its ranks, and every rank has to call this.
        """
        self.flush()
        batches, self._batches = self._batches, []
        device = batches[-1].device
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        # Means over the samples that count, of each value over the batches that have it (`frozen_every`).
        totals = dict.fromkeys(VALUES, 0)
        sums = {name: torch.zeros((), dtype=dtype, device=device) for name in VALUES}
        for batch in batches:
            if batch.instances:
                share = torch.full((), batch.augmented / batch.instances, dtype=dtype, device=device)
                for name, value in {**batch.values, "augmented": share}.items():
                    totals[name] += batch.instances
                    sums[name] = sums[name] + value.to(device, dtype) * batch.instances
        counts = torch.tensor(list(totals.values()), dtype=dtype).to(device, non_blocking=True)
        found = torch.stack([*sums.values()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            both = torch.stack([found, counts])
            torch.distributed.all_reduce(both)
            found, counts = both
        bins = [x.to(device, dtype) for x in (batches[-1].gammas, batches[-1].gaps)]  # global already
        self._ended = (number, len(bins[0]), torch.cat([*bins, found / counts]))

    def trainer_counts(self, first: int, trainer_step: int) -> None:
        """The first step of this log is `first`, and the trainer's own count before it was `trainer_step`.

        To be called before that step's line is written; without a call the two are taken to agree.
        """
        if self._ended is not None and not self._started:
            self._ended = (first, *self._ended[1:])
            self._about["trainer_step"] = trainer_step

    def latest(self) -> dict[str, Any] | None:
        """The last ended step as its line says it, or None before the first."""
        if self._ended is not None:
            number, bins, packed = self._ended
            numbers = [n if math.isfinite(n) else None for n in packed.tolist()]  # JSON has no NaN
            gamma, gap = numbers[:bins], numbers[bins : 2 * bins]
            self._latest = {
                "step": number,
                "gamma": gamma,
                "gap": gap,
                **dict(zip(VALUES, numbers[2 * bins :], strict=True)),
            }
            self._ended = None
            self.then(self._latest)
            self._write(self._latest)
        return self._latest

    def flush(self) -> None:
        """Write the last ended step if that has not been done."""
        self.latest()

    def _write(self, line: dict[str, Any]) -> None:
        if self.path is None:
            return
        if not self._started:
            self._start(self.path, line["step"])
        try:
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            logger.warning("apt-hooks: %s cannot be written (%s); training goes on without it", self.path, error)
            self.path = None

    def _start(self, path: Path, first_step: int) -> None:
        """A new run begins a new file; a resumed one goes on behind the step it was resumed from."""
        kept: list[str] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            earlier = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        except OSError as error:
            raise AptError(f"{error.filename or path}: cannot be made or read: {error.strerror}") from error
        dropped = 0
        for text in earlier:
            number = _step_number(text)
            if first_step > 1 and number is not None and number < first_step:
                kept.append(text + "\n")
            elif number is not None and '"step"' in text:
                dropped += 1
        if dropped:
            _put_aside(path, dropped)
        about = {**self._about, "started": _now()}
        if first_step > 1:
            about["resumed_from"] = first_step - 1
        kept.append(json.dumps({"run": about}) + "\n")
        write_atomically(path, "".join(kept).encode())
        self._started = True


def _step_number(text: str) -> int | None:
    """The step of a line, or before which one a run's line stands; None for the piece that a crash left behind."""
    try:
        line = json.loads(text)
        return int(line["run"].get("resumed_from", 0) + 1 if "run" in line else line["step"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _put_aside(path: Path, steps: int) -> None:
    """Give an earlier run's log the first name that is free, and say so."""
    aside = free_name(path)
    try:
        path.rename(aside)
    except OSError as error:
        raise AptError(
            f"{path}: is of an earlier run, and cannot be renamed to {aside.name}: {error.strerror}"
        ) from error
    logger.warning(
        "apt-hooks: %s had %d steps of an earlier run that this one does not continue; it is kept as %s",
        path,
        steps,
        aside.name,
    )


def _now() -> str:
    """In local time, as the trainers' files have it in their names."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
