"""What a judge of pictures is: what it is given, and the columns and scores that come of it."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Metric:
    """A column of the table.

    Attributes:
        name: as in `metrics.json`.
        best: "highest" or "lowest".
        model: that judges: its name or file.
        settings: what else the number depends on, in words.
    """

    name: str
    best: str
    model: str
    settings: str


@dataclasses.dataclass(frozen=True)
class Score:
    """A number, the number of things it is a mean over or of, and its standard error where it is a mean."""

    value: float
    n: int
    error: float | None = None

    @classmethod
    def mean(cls, values: Sequence[float], each: int = 1) -> Score:
        """Of `each` values a prompt, prompt by prompt; the error is that of the prompts' means.

        Pictures of one prompt are alike, so an error over pictures would be too small.
        """
        means = [statistics.fmean(values[i : i + each]) for i in range(0, len(values), each)]
        error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None
        return cls(statistics.fmean(values), len(values), error)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Pictures of one model, and what they are to be compared with.

    Attributes:
        files: the pictures, `each` of a prompt, prompt by prompt.
        plain: of each picture the prompt without the identifier.
        each: pictures of a prompt.
        base: as many of the base model's, of the same prompts and other noise.
    """

    files: Sequence[Path]
    plain: Sequence[str]
    each: int
    base: Sequence[Path]


class Judge(Protocol):
    """Something that has columns, and a score for each of them."""

    @property
    def metrics(self) -> tuple[Metric, ...]: ...

    def score(self, drawn: Drawn) -> dict[str, Score]:
        """By the metrics' names."""
        ...


def score_all(judges: Sequence[Judge], drawn: Mapping[str, Drawn], tell: Callable[[str], None]) -> dict[str, Any]:
    """Scores by model and metric.

    Args:
        tell: is told what is being judged.
    """
    scores: dict[str, dict[str, Score]] = {name: {} for name in drawn}
    for judge in judges:
        for name, shown in drawn.items():
            tell(f"{name}: {', '.join(metric.name for metric in judge.metrics)}")
            scores[name] |= judge.score(shown)
    return scores
