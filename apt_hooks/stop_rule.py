"""The key `stop`: a rule that a user can read, by which a training ends early."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import AptError, nearest

MEASURES = ("gamma", "class_drift", "free_drift", "prompt_response", "text_drift", "held_out_gap")
"""What a rule may look at: gamma's mean over the bins, in the steps; the rest as a checkpoint's line has it."""

_BAD = dict.fromkeys(MEASURES, ">") | {"prompt_response": "<", "held_out_gap": "<"}
"""In which direction each is worse: a rule ends a training, so it has to be about that."""

_TERM = re.compile(
    r"(?P<name>[\w-]+)\s*(?P<sign>[<>])\s*(?P<bound>[-+.\deE]+)(?:\s+for\s+(?P<steps>\d+)(?:\s+steps?)?)?"
)
_EXAMPLE = '"gamma > 0.9 for 200 steps or prompt_response < 0.25"'


@dataclasses.dataclass(frozen=True)
class _Term:
    name: str
    sign: str
    bound: float
    steps: int

    @property
    def part(self) -> str:
        """Without how long."""
        return f"{self.name} {self.sign} {self.bound:g}"

    def why_pointless(self) -> str | None:
        """Why it holds never or always, whatever a run comes to; None: it does not."""
        bound, above = self.bound, self.sign == ">"
        if self.name == "gamma" and not (0 <= bound < 1 if above else 0 < bound <= 1):
            holds = "always" if (bound < 0 if above else bound > 1) else "never"
            return f"gamma is from 0 to 1, so {self.part} {holds} holds: compare it with a number between 0 and 1"
        if self.name.endswith("_drift") and (bound < 0 if above else bound <= 0):
            holds = "always" if above else "never"
            return f"{self.name} is never below 0, so {self.part} {holds} holds: compare it with a number above 0"
        return None

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
        return self.part + (f" for {self.steps} steps" if self.name == "gamma" else "")


class StopRule:
    """`NAME > NUMBER` or `NAME < NUMBER`, of `MEASURES`; several by "and", and such groups by "or".

    Behind a term of gamma, `for N steps`: in each of the last N; 1 if not said. A list in a line counts as its mean.

    Args:
        text: the value of the key.

    Raises:
        AptError: it is no such rule; a part of it holds never or always; or it would end a training that goes well.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        groups = re.split(r"\s+or\s+", text.strip())
        self._groups = [[_term(text, part) for part in re.split(r"\s+and\s+", group)] for group in groups]
        for group in self._groups:
            _check(text, group)

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
    """Whether the key may be this; AptError where it is text that is none (`StopRule`)."""
    if isinstance(value, str):
        StopRule(value)
    return value is None or isinstance(value, str)


RULE = (
    f"NAME > NUMBER or NAME < NUMBER of {', '.join(MEASURES)}, joined by `and` and `or`, gamma's with `for N steps`, "
    f"such as {_EXAMPLE}"
)


def _term(text: str, part: str) -> _Term:
    match = _TERM.fullmatch(part.strip())
    if match is not None and match["name"] not in MEASURES:
        raise AptError(
            f"[apt] stop = {text!r}: {match['name']} is nothing that is measured{nearest(match['name'], MEASURES)} "
            f"A rule is about {', '.join(MEASURES)}"
        )
    try:
        if match is None or not math.isfinite(bound := float(match["bound"])):
            raise ValueError
        steps = int(match["steps"] or 1)
        if steps < 1 or (match["steps"] and match["name"] != "gamma"):
            raise ValueError
    except ValueError as error:
        raise AptError(f"[apt] stop must be {RULE}; found {text!r}") from error
    return _Term(match["name"], match["sign"], bound, steps)


def _check(text: str, group: Sequence[_Term]) -> None:
    for term in group:
        if why := term.why_pointless():
            raise AptError(f"[apt] stop = {text!r}: {why}")
    # Beside what is bad, a term of the other direction narrows that down: "class_drift > 1 and gamma < 0.5".
    if not any(term.sign == _BAD[term.name] for term in group):
        term = group[0]
        level = "high" if term.sign == ">" else "low"
        raise AptError(
            f"[apt] stop = {text!r}: a {level} {term.name} is good, and a rule ends the "
            f"training; did you mean {term.name} {_BAD[term.name]}?"
        )
