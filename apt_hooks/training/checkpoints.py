"""What a run writes about each LoRA that it saves, and whether it goes on after it."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import AptError
from ..files import free_name, write_atomically
from ..stop_rule import StopRule
from .checkpoint_drifts import Drifts
from .held_out import HeldOut

ENDING = "-checkpoints.jsonl"
METADATA = "ss_apt_checkpoint"
SHARE = 0.02
"""Of the time between two checkpoints, what measuring may take before that is said."""

STOPS_ALONE = "[apt] stop ends no training of several processes; it marks, and keeps the best"
STOPPED = "apt-hooks: [apt] stop has ended the training: %s"

logger = logging.getLogger("apt_hooks")


def check_rule(rule: str | None, *, off: str, class_word: bool, held_out: bool) -> None:
    """Check that all that a rule looks at is measured; what is not would never meet it.

    Args:
        rule: the key `stop`.
        off: why no drifts are measured; empty where they are.
        class_word: whether there is one, for the class drift.
        held_out: whether there are pictures that are not trained on.

    Raises:
        AptError: something is not measured.
    """
    names = set[str]() if rule is None else StopRule(rule).names
    lacking = {name: f"is not measured ({off})" for name in Drifts.NAMES if off}
    if not off and not class_word:
        lacking["class_drift"] = "needs identifier and class_word"
    if not held_out:
        lacking[HeldOut.NAME] = "needs a validation split, pictures that are not trained on, and drifts = true"
    for name in sorted(names & lacking.keys()):
        raise AptError(
            f"[apt] stop names {name}, which {lacking[name]}; found stop = {rule!r} without: add that, or leave {name} "
            "out"
        )


class Checkpoints:
    """Lines for the checkpoints of a run, beside them as `NAME-checkpoints.jsonl`, and the copy of the best.

    `measure` before a file is written, for its metadata, and `saved` once it is. The first line is of the run: `drifts`
    says what is measured, or `off` why not. A file of an earlier run that is not continued is kept as `NAME.1.jsonl`
    and so on.

    Args:
        path: the file; None writes none (ranks other than the first, which measure nothing either).
        drifts: what measures; None where that is off.
        off: why, for people; empty where it is not.
        held_out: what measures the held-out gap; None where there are no such pictures.
        rule: the key `stop`.
        about: what the file's first line says beside.

    Raises:
        AptError: the rule is about the held-out gap, and nothing measures it.

    Attributes:
        stop: why the training is to end, once the rule says so; until then None.
    """

    def __init__(
        self,
        path: Path | None,
        drifts: Drifts | None = None,
        *,
        off: str = "",
        held_out: HeldOut | None = None,
        rule: str | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.stop: str | None = None
        self._drifts, self._off, self._about = drifts, off, dict(about or {})
        self._held_out = held_out
        self._rule = None if rule is None else StopRule(rule)
        check_rule(
            rule,
            off=off if drifts is None else "",
            class_word=drifts is not None and drifts.class_prompt is not None,
            held_out=held_out is not None,
        )
        self._gammas: list[float] = []
        self._delta_noise: list[float | None] = []
        self._last = time.perf_counter()
        self._cost = 0.0
        self._begun = self._told = False
        self._best: tuple[int, Path] | None = None
        self._resumed_at: int | None = None
        self._missing: set[str] = set()

    def in_words(self) -> str:
        """For the start line."""
        if self._drifts is None:
            said = f"no drifts of checkpoints: {self._off}"
        elif self._drifts.class_prompt is None:
            said = "drifts of checkpoints (no class drift: give identifier and class_word)"
        else:
            said = "drifts of checkpoints"
        if self._held_out is not None:
            said += ", held-out gap"
        return said if self._rule is None else f"{said}, stop when {self._rule.text}"

    def resumed(self, step: int) -> None:
        """The run goes on behind this step; lines up to there are kept."""
        self._resumed_at = step

    def took(self, line: Mapping[str, Any]) -> None:
        """A step's line of the step log (`StepLog`), each of them once."""
        known = [g for g, gap in zip(line["gamma"], line["gap"], strict=True) if g is not None and gap is not None]
        self._gammas.append(sum(known) / len(known) if known else math.nan)
        self._delta_noise.append(line["delta_noise"])

    def measure(self, step: int, gammas: Sequence[float], gaps: Sequence[float]) -> dict[str, Any]:
        """The line of the LoRA as it is.

        Args:
            step: how many steps it was trained.
            gammas, gaps: [bins], the indicator's; a gap is NaN for a bin not seen yet.
        """
        started = time.perf_counter()
        recent = [value for value in self._delta_noise[-50:] if value is not None]  # None: no frozen pass there
        line: dict[str, Any] = {
            "step": step,
            "gamma": [None if gap != gap else round(gamma, 6) for gamma, gap in zip(gammas, gaps, strict=True)],
            "gap": [None if gap != gap else gap for gap in gaps],
            "delta_noise": sum(recent) / len(recent) if recent else None,
            **dict.fromkeys((*Drifts.NAMES, HeldOut.NAME)),
        }
        # A training is worth more than what is measured of it.
        if self._drifts is not None and self.path is not None:
            try:
                line |= {name: _digits(value) for name, value in self._drifts.measure().items()}
            except (AptError, torch.OutOfMemoryError) as error:
                self._drifts, self._off = None, " ".join(str(error).split())
                logger.warning("apt-hooks: drifts of checkpoints are off from here on: %s", self._off)
        if self._held_out is not None and self.path is not None:
            try:
                line[HeldOut.NAME] = self._held_out.measure()
            except Exception as error:  # it reads pictures, by the trainer's own code
                self._held_out, why = None, " ".join(f"{type(error).__name__}: {error}".split())
                logger.warning("apt-hooks: the held-out gap is off from here on: %s", why)
        self._cost = time.perf_counter() - started
        line["seconds"] = float(f"{self._cost:.3g}")
        line["stop"] = None if self._rule is None else self._rule.met(self._gammas, line)
        self._tell_what_is_missing(line)
        return line

    def _tell_what_is_missing(self, line: Mapping[str, Any]) -> None:
        """Say once of each measure that the rule names and that was not taken, such as the drift of text encoders that
        are not trained: no rule is met by it."""
        if self._rule is None or self.path is None:
            return
        missing = {name for name in self._rule.names - {"gamma"} if line[name] is None} - self._missing
        self._missing |= missing
        for name in sorted(missing):
            logger.warning(
                "apt-hooks: stop names %s, which is not measured here: that part of the rule holds never", name
            )

    def metadata(self, line: Mapping[str, Any]) -> dict[str, str]:
        """What the checkpoint itself carries: the line without its time, so that a run gives the same file again."""
        return {METADATA: json.dumps({name: value for name, value in line.items() if name != "seconds"})}

    def saved(self, line: Mapping[str, Any], file: Path) -> None:
        """The LoRA of this line is in this file now."""
        if self.path is None:
            return
        now = time.perf_counter()
        share, cost = self._cost / max(now - self._last, 1e-9), self._cost
        self._last, self._cost = now, 0.0  # a line may be of two files
        if self._begun and share > SHARE and not self._told:
            self._told = True
            logger.warning(
                "apt-hooks: measuring a checkpoint took %.1f s, %.0f %% of the time since the last one; save less "
                "often, or set [apt] drifts = false",
                cost,
                100 * share,
            )
        self._write({"step": line["step"], "file": self._beside(file), **line})
        if self._rule is None:
            return
        met = line["stop"]
        if met is None or self._best is None:
            self._best = line["step"], _copy(file, self.path.with_name(self._name + f"-best{file.suffix}"))
        if met is not None and self.stop is None:
            step, path = self._best
            self.stop = f"{met} at step {line['step']}; {path.name} is the LoRA of step {step}"

    def _beside(self, file: Path) -> str:
        """A file's name as seen from the lines, such as `checkpoint-500/pytorch_lora_weights.safetensors`."""
        assert self.path is not None
        folder, whole = self.path.parent.resolve(), file.resolve()
        return whole.relative_to(folder).as_posix() if whole.is_relative_to(folder) else file.name

    @property
    def _name(self) -> str:
        assert self.path is not None
        return self.path.name.removesuffix(ENDING)

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self.path is not None
        try:
            if not self._begun:
                self._begin(self.path)
            with self.path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            logger.warning("apt-hooks: %s cannot be written (%s); training goes on without it", self.path, error)
            self.path = None

    def _begin(self, path: Path) -> None:
        self._begun = True
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        kept = [text for text in earlier if self._resumed_at is not None and _step(text) <= self._resumed_at]
        if any(_step(text) > 0 for text in earlier) and not kept:
            path.rename(free_name(path))
        about: dict[str, Any] = {**self._about, "stop": None if self._rule is None else self._rule.text}
        if self._drifts is None:
            about["off"] = self._off
        else:
            about["class"], about["free"] = self._drifts.class_prompt, list(self._drifts.neutral)
        write_atomically(path, "".join(f"{text}\n" for text in [*kept, json.dumps({"run": about})]).encode())


def _step(text: str) -> int:
    """Of a line; 0 of a run's, and of the piece of one, which a crash left."""
    try:
        return int(json.loads(text).get("step", 0))
    except (ValueError, TypeError, AttributeError):
        return 0


def _digits(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def _copy(file: Path, to: Path) -> Path:
    try:
        write_atomically(to, file.read_bytes())
    except OSError as error:
        raise AptError(f"{file}: cannot be read for {to.name}: {error.strerror}") from error
    return to
