"""A picture that shapes are painted on: signed distances with soft edges."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

SIZE = 64

Color = tuple[float, float, float]
INK: Color = (0.10, 0.09, 0.12)


class Canvas:
    """A picture, and the coordinates in which the next shapes are given: u to the right, v down, 1 the radius."""

    def __init__(self) -> None:
        self.y, self.x = pixels()
        self.image = torch.zeros(3, SIZE, SIZE)
        self.at(SIZE / 2, SIZE / 2, SIZE / 2)

    def at(self, x: float, y: float, radius: float) -> None:
        self.radius = radius
        self.u, self.v = (self.x - x) / radius, (self.y - y) / radius

    def paint(self, distance: Tensor, color: Color | Tensor, *, within: Tensor | None = None) -> None:
        """Paint where `distance` (in radii) is below 0, if given only where `within` is too."""
        if within is not None:
            distance = torch.maximum(distance, within)
        cover = (0.5 - distance * self.radius).clamp(0, 1)
        paint = color if isinstance(color, Tensor) else torch.tensor(color)[:, None, None]
        self.image = torch.lerp(self.image, paint.expand_as(self.image), cover)

    # Signed distances, in radii.
    def disc(self, u: float, v: float, r: float, stretch: float = 1.0) -> Tensor:
        return torch.hypot((self.u - u) / stretch, self.v - v) - r

    def box(self, u: float, v: float, width: float, height: float) -> Tensor:
        return torch.maximum((self.u - u).abs() - width, (self.v - v).abs() - height)

    def polygon(self, *points: tuple[float, float]) -> Tensor:
        """A convex polygon, its corners clockwise as seen."""
        edges = []
        for (u0, v0), (u1, v1) in zip(points, (*points[1:], points[0]), strict=True):
            du, dv = u1 - u0, v1 - v0
            edges.append(((self.u - u0) * dv - (self.v - v0) * du) / (du * du + dv * dv) ** 0.5)
        return functools.reduce(torch.maximum, edges)


@functools.cache
def pixels() -> tuple[Tensor, Tensor]:
    axis = torch.arange(SIZE) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return y, x


def join(*distances: Tensor) -> Tensor:
    return functools.reduce(torch.minimum, distances)
