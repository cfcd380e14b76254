"""The step log: one line of JSON an optimizer step, numbers fetched from the device once and late."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import write_atomically
from .objective import AptStep

VALUES = ("loss_tuned", "loss_frozen", "loss_weight", "augmented", "l_mu", "l_sigma", "l_attn", "delta_noise")


class StepLog:
    """Writes `step`, `gamma` (list, as the step used it) and `VALUES` (null where a step had none) to a jsonl file.

    A step's line is written when the next one begins, or at `flush`, so that the device is not waited for in the middle
    of a step.

    Args:
        path: the file; None keeps the last line for `latest` and writes nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._batches: list[tuple[AptStep, int]] = []
        self._ended: tuple[int, int, list[str], Tensor] | None = None
        self._latest: dict[str, Any] | None = None
        self._started = False

    def add(self, step: AptStep, augmented: int) -> None:
        """One batch, `augmented` of its samples moved; several batches make a step under gradient accumulation."""
        self._batches.append((step, augmented))

    def end_step(self, number: int) -> None:
        """The batches added since the last call are optimizer step `number`, counted from 1."""
        self.flush()
        batches, self._batches = self._batches, []
        gammas = batches[-1][0].gammas
        total = max(1, sum(step.counted for step, _ in batches))
        sums: dict[str, Tensor] = {}
        for step, augmented in batches:
            if step.counted:
                share = gammas.new_tensor(augmented / step.counted)
                for name, value in {**step.values, "augmented": share}.items():
                    sums[name] = sums.get(name, 0.0) + value.to(gammas) * (step.counted / total)
        self._ended = (number, len(gammas), list(sums), torch.cat([gammas, *(value[None] for value in sums.values())]))

    def latest(self) -> dict[str, Any] | None:
        """The last ended step as its line says it, or None before the first."""
        if self._ended is not None:
            number, bins, names, packed = self._ended
            numbers = [n if math.isfinite(n) else None for n in packed.tolist()]  # JSON has no NaN
            means = dict(zip(names, numbers[bins:], strict=True))
            self._latest = {"step": number, "gamma": numbers[:bins], **{name: means.get(name) for name in VALUES}}
            self._ended = None
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
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(line) + "\n")

    def _start(self, path: Path, first_step: int) -> None:
        """A new run begins a new file; a resumed one goes on behind the step it was resumed from."""
        kept = []
        if first_step > 1 and path.exists():
            for text in path.read_text(encoding="utf-8").splitlines():
                number = _step_number(text)
                if number is not None and number < first_step:
                    kept.append(text + "\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(kept).encode())
        self._started = True


def _step_number(text: str) -> int | None:
    """The step of a line; None for the piece of one that a crash left behind."""
    try:
        return int(json.loads(text)["step"])
    except (ValueError, KeyError, TypeError):
        return None
