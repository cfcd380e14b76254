"""Which of several are worth a look when they are judged by two scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Name = TypeVar("Name")


def front(points: Mapping[Name, tuple[float, float]]) -> dict[Name, Name | None]:
    """Of each point None where it is on the Pareto front, else the one of those that beat it with the largest sum.

    Another beats it by being as high in both scores and higher in one; the one with the largest sum is on the front.
    """
    beaten: dict[Name, Name | None] = {}
    for name, (x, y) in points.items():
        better = [(a + b, other) for other, (a, b) in points.items() if a >= x and b >= y and (a, b) != (x, y)]
        beaten[name] = max(better, key=lambda pair: pair[0])[1] if better else None
    return beaten
