"""Which of several are worth a look when they are judged by two scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Name = TypeVar("Name")


def front(points: Mapping[Name, tuple[float, float]]) -> dict[Name, Name | None]:
    """Of each point None where it is on the Pareto front, else one of the front that is as good by both and better by
    one; higher is better. Of those that beat it, the one with the largest sum."""
    beaten: dict[Name, Name | None] = {}
    for name, (x, y) in points.items():
        better = [(a + b, other) for other, (a, b) in points.items() if a >= x and b >= y and (a, b) != (x, y)]
        beaten[name] = max(better, key=lambda pair: pair[0])[1] if better else None
    return beaten
