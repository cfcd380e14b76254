"""The key `stop`: a rule that a user can read, by which a training ends early."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import AptError

MEASURES = ("gamma", "class_drift", "free_drift", "prompt_response", "text_drift", "held_out_gap")
"""What a rule may look at: gamma's mean over the bins, in the steps; the rest as a checkpoint's line has it."""

_TERM = re.compile(r"(?P<name>\w+)\s*(?P<sign>[<>])\s*(?P<bound>[-+.\deE]+)(?:\s+for\s+(?P<steps>\d+)(?:\s+steps?)?)?")
_EXAMPLE = '"gamma > 0.9 for 200 steps or class_drift > 0.5"'


@dataclasses.dataclass(frozen=True)
class _Term:
    name: str
    sign: str
    bound: float
    steps: int

    def met(self, gammas: Sequence[float], line: Mapping[str, Any]) -> bool:
        if self.name == "gamma":
            last = gammas[-self.steps :]
            return len(last) == self.steps and all(map(self._crosses, last))
        found = line.get(self.name)
        if isinstance(found, (list, tuple)):
            known = [value for value in found if value is not None]
            found = sum(known) / len(known) if known else None
        return found is not None and self._crosses(found)

    def _crosses(self, value: float) -> bool:
        return value > self.bound if self.sign == ">" else value < self.bound  # NaN crosses nothing

    def __str__(self) -> str:
        return f"{self.name} {self.sign} {self.bound:g}" + (f" for {self.steps} steps" if self.name == "gamma" else "")


class StopRule:
    """`NAME > NUMBER` or `NAME < NUMBER`, of `MEASURES`; several by "and", and such groups by "or".

    Behind a term of gamma, `for N steps`: in each of the last N; 1 if not said. A list in a line counts as its mean.

    Args:
        text: the value of the key.

    Raises:
        AptError: it is no such rule.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        groups = re.split(r"\s+or\s+", text.strip())
        self._groups = [[_term(text, part) for part in re.split(r"\s+and\s+", group)] for group in groups]

    @property
    def names(self) -> set[str]:
        """Of `MEASURES`, those that it is about."""
        return {term.name for group in self._groups for term in group}

    def met(self, gammas: Sequence[float], line: Mapping[str, Any]) -> str | None:
        """The part of the rule that holds, None where none does.

        Args:
            gammas: of each step up to now, its mean over the bins.
            line: of the checkpoint, by `MEASURES`; what is missing or None meets no rule.
        """
        for group in self._groups:
            if all(term.met(gammas, line) for term in group):
                return " and ".join(map(str, group))
        return None


def is_stop_rule(value: object) -> bool:
    """Whether the key may be this."""
    if not isinstance(value, str):
        return value is None
    try:
        StopRule(value)
    except AptError:
        return False
    return True


RULE = (
    f"NAME > NUMBER or NAME < NUMBER of {', '.join(MEASURES)}, joined by `and` and `or`, gamma's with `for N steps`, "
    f"such as {_EXAMPLE}"
)


def _term(text: str, part: str) -> _Term:
    match = _TERM.fullmatch(part.strip())
    try:
        if match is None or match["name"] not in MEASURES or not math.isfinite(bound := float(match["bound"])):
            raise ValueError
        steps = int(match["steps"] or 1)
        if steps < 1 or (match["steps"] and match["name"] != "gamma"):
            raise ValueError
    except ValueError as error:
        raise AptError(f"[apt] stop must be {RULE}; found {text!r}") from error
    return _Term(match["name"], match["sign"], bound, steps)
