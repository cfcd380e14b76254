"""Draws what is around the main object: backgrounds, second objects in the sky, and the styles of a whole picture."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .canvas import INK, SIZE, Canvas, Color, join, pixels


def _bands(c: Canvas, *bands: tuple[float, Color]) -> None:
    """Horizontal bands, each from its upper edge (pixels from the top) down."""
    for top, color in bands:
        c.image = torch.where((c.y >= top)[None], torch.tensor(color)[:, None, None], c.image)


def _beach(c: Canvas, rng: random.Random) -> None:
    horizon = rng.uniform(24, 29)
    _bands(
        c, (0, (0.55, 0.80, 0.96)), (horizon, (0.10, 0.50, 0.70)), (horizon + rng.uniform(9, 13), (0.93, 0.83, 0.58))
    )


def _forest(c: Canvas, rng: random.Random) -> None:
    _bands(c, (0, (0.16, 0.36, 0.20)), (rng.uniform(38, 43), (0.36, 0.48, 0.16)))
    x = rng.uniform(0, 6)
    while x < SIZE:
        c.at(x, 20, 1.0)
        c.paint(c.box(0, 0, rng.uniform(1.2, 2.2), rng.uniform(20, 23)), (0.26, 0.18, 0.10))
        x += rng.uniform(9, 14)


def _snow(c: Canvas, rng: random.Random) -> None:
    _bands(c, (0, (0.66, 0.72, 0.80)), (rng.uniform(30, 36), (0.95, 0.97, 1.00)))
    for _ in range(14):
        c.at(rng.uniform(0, SIZE), rng.uniform(0, 34), 1.0)
        c.paint(c.disc(0, 0, 1.1), (1.0, 1.0, 1.0))


def _desert(c: Canvas, rng: random.Random) -> None:
    _bands(c, (0, (0.98, 0.88, 0.66)), (rng.uniform(38, 42), (0.88, 0.58, 0.28)))
    for _ in range(2):
        c.at(rng.uniform(0, SIZE), rng.uniform(46, 52), rng.uniform(16, 22))
        c.paint(c.disc(0, 0, 0.7, 1.8), (0.80, 0.48, 0.20))


def _night(c: Canvas, rng: random.Random) -> None:
    _bands(c, (0, (0.05, 0.06, 0.20)), (rng.uniform(40, 46), (0.13, 0.12, 0.22)))
    for _ in range(12):
        c.at(rng.uniform(0, SIZE), rng.uniform(0, 36), 1.0)
        c.paint(c.disc(0, 0, 0.9), (1.0, 0.98, 0.75))


def _city(c: Canvas, rng: random.Random) -> None:
    _bands(c, (0, (0.78, 0.80, 0.80)), (46, (0.36, 0.36, 0.38)))
    x = 0.0
    while x < SIZE:
        width, height = rng.uniform(9, 14), rng.uniform(18, 36)
        gray = rng.uniform(0.48, 0.62)
        c.at(x + width / 2, 46 - height / 2, 1.0)
        c.paint(c.box(0, 0, width / 2, height / 2), (gray, gray * 0.92, gray * 0.9))
        windows = torch.maximum((c.u.remainder(4.0) - 2).abs() - 1, (c.v.remainder(6.0) - 3).abs() - 1.3)
        c.paint(windows, (0.95, 0.88, 0.55), within=c.box(0, 0, width / 2 - 1, height / 2 - 2))
        x += width


BACKGROUNDS: dict[str, Callable[[Canvas, random.Random], None]] = {
    "beach": _beach,
    "forest": _forest,
    "snow": _snow,
    "desert": _desert,
    "night": _night,
    "city": _city,
}


def _sun(c: Canvas) -> None:
    angle = torch.atan2(c.u, c.v)
    c.paint(torch.hypot(c.u, c.v) - 0.8 - 0.2 * torch.cos(8 * angle), (1.0, 0.75, 0.1))


def _cloud(c: Canvas) -> None:
    c.paint(join(c.disc(-0.6, 0.15, 0.5), c.disc(0.1, -0.1, 0.62), c.disc(0.75, 0.2, 0.42)), (0.93, 0.94, 0.97))


def _balloon(c: Canvas) -> None:
    c.paint(c.box(0, 1.1, 0.09, 0.5), INK)
    c.paint(c.disc(0, -0.1, 0.8), (0.93, 0.28, 0.55))


def _bird(c: Canvas) -> None:
    for side in (-1, 1):
        wing = (c.v + 0.35 - 0.5 * (c.u * side - 0.55).square() * 3).abs() - 0.16
        c.paint(torch.maximum(wing, (c.u * side - 0.5).abs() - 0.55), (0.80, 0.22, 0.16))


SECONDS: dict[str, Callable[[Canvas], None]] = {"sun": _sun, "cloud": _cloud, "balloon": _balloon, "bird": _bird}


def _photo(image: Tensor) -> Tensor:
    y, x = pixels()
    corner = ((x - 32).square() + (y - 32).square()) / 2048
    return image * (1 - 0.12 * corner)


def _drawing(image: Tensor) -> Tensor:
    """Pale paper with dark lines where the picture has edges."""
    padded = F.pad(image[None], (0, 1, 0, 1), mode="replicate")[0]
    edges = (padded[:, 1:, :-1] - image).abs().sum(0) + (padded[:, :-1, 1:] - image).abs().sum(0)
    return (0.62 + 0.38 * image) * (1 - 0.85 * (1.4 * edges).clamp(0, 1))


def _painting(image: Tensor) -> Tensor:
    """Slanted brush strokes and strong colors."""
    y, x = pixels()
    strokes = 0.12 * torch.sin(math.pi / 4 * (x + y))
    mean = image.mean(0, keepdim=True)
    return mean + 1.25 * (image - mean) + strokes


STYLES: dict[str, Callable[[Tensor], Tensor]] = {"photo": _photo, "drawing": _drawing, "painting": _painting}
