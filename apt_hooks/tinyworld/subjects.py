"""Draws the main objects: bodies, what every object of a kind has, patterns and parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .canvas import INK, Canvas, Color, join
from .world import COLORS, Subject

_GLASS: Color = (0.70, 0.88, 0.95)
_BROWN: Color = (0.45, 0.29, 0.16)


def draw_subject(c: Canvas, subject: Subject) -> None:
    body = _BODIES[subject.kind](c)
    outline = 1.2 / c.radius
    c.paint(body - outline, INK)
    shade = (1.0 - 0.18 * (c.u + c.v)).clamp(0.7, 1.15)
    c.paint(body, torch.tensor(COLORS[subject.color])[:, None, None] * shade)
    if subject.pattern:
        second = torch.tensor(COLORS[subject.second_color])[:, None, None] * shade
        c.paint(_PATTERNS[subject.pattern](c), second, within=body)
    _DETAILS[subject.kind](c)
    for part in subject.parts:
        _PARTS[part](c, _HEADS[subject.kind])


_BODIES: dict[str, Callable[[Canvas], Tensor]] = {
    "ball": lambda c: c.disc(0, 0.05, 0.92),
    "house": lambda c: join(c.box(0, 0.38, 0.78, 0.6), c.polygon((0, -0.95), (0.98, -0.15), (-0.98, -0.15))),
    "car": lambda c: join(
        c.box(0, 0.35, 1.1, 0.32), c.polygon((-0.45, -0.4), (0.45, -0.4), (0.75, 0.08), (-0.75, 0.08))
    ),
    "fish": lambda c: join(c.disc(-0.15, 0.1, 0.58, 1.5), c.polygon((0.5, 0.1), (1.15, -0.5), (1.15, 0.7))),
    "tree": lambda c: join(c.disc(0, -0.45, 0.5), c.disc(-0.42, 0.0, 0.48), c.disc(0.42, 0.0, 0.48)),
    "boat": lambda c: join(
        c.polygon((-1.1, 0.4), (1.1, 0.4), (0.65, 0.95), (-0.65, 0.95)),
        c.polygon((0.08, -0.95), (0.9, 0.2), (0.08, 0.2)),
    ),
    "cup": lambda c: join(
        c.polygon((-0.7, -0.45), (0.6, -0.45), (0.45, 0.95), (-0.55, 0.95)),
        torch.maximum(c.disc(0.6, 0.2, 0.46), -c.disc(0.6, 0.2, 0.24)),
    ),
    "mushroom": lambda c: torch.maximum(c.disc(0, 0.15, 1.0), c.v - 0.15),
}


def _no_details(c: Canvas) -> None:
    pass


def _house_details(c: Canvas) -> None:
    c.paint(c.box(0.0, 0.66, 0.2, 0.32), _BROWN)
    for u in (-0.48, 0.48):
        c.paint(c.box(u, 0.3, 0.16, 0.16), _GLASS)


def _car_details(c: Canvas) -> None:
    for u in (-0.25, 0.25):
        c.paint(c.box(u, -0.14, 0.17, 0.16), _GLASS)
    for u in (-0.62, 0.62):
        c.paint(c.disc(u, 0.68, 0.3), INK)
        c.paint(c.disc(u, 0.68, 0.12), (0.8, 0.8, 0.8))


def _fish_details(c: Canvas) -> None:
    c.paint(c.disc(-0.62, 0.0, 0.16), (1.0, 1.0, 1.0))
    c.paint(c.disc(-0.65, 0.0, 0.09), INK)


def _tree_details(c: Canvas) -> None:
    c.paint(c.box(0, 0.72, 0.16, 0.26), _BROWN)


def _boat_details(c: Canvas) -> None:
    c.paint(c.box(0, -0.25, 0.06, 0.68), _BROWN)


def _cup_details(c: Canvas) -> None:
    c.paint(c.disc(-0.05, -0.45, 0.16, 4.0), _BROWN)


def _mushroom_details(c: Canvas) -> None:
    stem = c.polygon((-0.26, 0.15), (0.26, 0.15), (0.36, 0.98), (-0.36, 0.98))
    c.paint(stem - 1.2 / c.radius, INK)
    c.paint(stem, (0.93, 0.86, 0.74))


_DETAILS: dict[str, Callable[[Canvas], None]] = {
    "ball": _no_details,
    "house": _house_details,
    "car": _car_details,
    "fish": _fish_details,
    "tree": _tree_details,
    "boat": _boat_details,
    "cup": _cup_details,
    "mushroom": _mushroom_details,
}

# Where a hat would sit, and where a face would be.
_HEADS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "ball": ((0, -0.85), (0, 0.1)),
    "house": ((0, -0.9), (0, -0.35)),
    "car": ((0, -0.4), (0, 0.35)),
    "fish": ((-0.1, -0.48), (-0.1, 0.1)),
    "tree": ((0, -0.9), (0, -0.25)),
    "boat": ((0.08, -0.9), (0, 0.62)),
    "cup": ((-0.05, -0.6), (-0.05, 0.3)),
    "mushroom": ((0, -0.8), (0, -0.25)),
}

_PATTERNS: dict[str, Callable[[Canvas], Tensor]] = {
    "stripes": lambda c: ((c.u + 0.12).remainder(0.6) - 0.3).abs() - 0.14,
    "bands": lambda c: (c.v.remainder(0.6) - 0.3).abs() - 0.14,
    "dots": lambda c: torch.hypot(c.u.remainder(0.56) - 0.28, c.v.remainder(0.56) - 0.28) - 0.17,
    "checks": lambda c: 0.3 * torch.sign(torch.sin(7.5 * c.u) * torch.sin(7.5 * c.v)),
    "rings": lambda c: (torch.hypot(c.u, c.v - 0.05).remainder(0.5) - 0.25).abs() - 0.12,
    "halves": lambda c: c.u + 0.02,
    "zigzag": lambda c: ((c.v + (c.u.remainder(0.6) - 0.3).abs()).remainder(0.64) - 0.32).abs() - 0.14,
}


def _hat(c: Canvas, head: tuple[tuple[float, float], ...]) -> None:
    u, v = head[0]
    c.paint(join(c.box(u, v, 0.5, 0.09), c.box(u, v - 0.27, 0.28, 0.25)), INK)
    c.paint(c.box(u, v - 0.14, 0.28, 0.06), COLORS["red"])


def _flag(c: Canvas, head: tuple[tuple[float, float], ...]) -> None:
    u, v = head[0]
    c.paint(c.box(u, v - 0.3, 0.06, 0.42), INK)
    c.paint(c.polygon((u + 0.05, v - 0.72), (u + 0.62, v - 0.5), (u + 0.05, v - 0.28)), COLORS["red"])


def _horns(c: Canvas, head: tuple[tuple[float, float], ...]) -> None:
    u, v = head[0]
    for side in (-1, 1):
        tip, inner, outer = (u + side * 0.55, v - 0.42), (u + side * 0.1, v + 0.06), (u + side * 0.42, v + 0.14)
        c.paint(c.polygon(*((tip, outer, inner) if side > 0 else (tip, inner, outer))), INK)


def _face(c: Canvas, head: tuple[tuple[float, float], ...]) -> None:
    u, v = head[1]
    for side in (-1, 1):
        c.paint(c.disc(u + side * 0.24, v - 0.1, 0.17), (1.0, 1.0, 1.0))
        c.paint(c.disc(u + side * 0.22, v - 0.08, 0.09), INK)
    c.paint(torch.maximum(c.disc(u, v + 0.14, 0.24), v + 0.2 - c.v), INK)


def _halo(c: Canvas, head: tuple[tuple[float, float], ...]) -> None:
    u, v = head[0]
    ring = torch.maximum(c.disc(u, v - 0.28, 0.2, 2.6), -c.disc(u, v - 0.28, 0.1, 3.2))
    c.paint(ring, COLORS["yellow"])


def _star(c: Canvas, head: tuple[tuple[float, float], ...]) -> None:
    u, v = head[1]
    angle = torch.atan2(c.u - u, v - c.v)
    reach = 0.26 + 0.14 * torch.cos(5 * angle)
    c.paint(torch.hypot(c.u - u, c.v - v) - reach - 0.07, INK)
    c.paint(torch.hypot(c.u - u, c.v - v) - reach, COLORS["yellow"])


def _scarf(c: Canvas, head: tuple[tuple[float, float], ...]) -> None:
    u, v = head[1]
    c.paint(join(c.box(u, v + 0.5, 0.7, 0.11), c.box(u + 0.42, v + 0.72, 0.12, 0.28)), COLORS["red"])


def _crown(c: Canvas, head: tuple[tuple[float, float], ...]) -> None:
    u, v = head[0]
    teeth = [c.polygon((u + d, v - 0.5), (u + d + 0.17, v), (u + d - 0.17, v)) for d in (-0.28, 0.0, 0.28)]
    crown = join(c.box(u, v, 0.45, 0.12), *teeth)
    c.paint(crown - 0.07, INK)
    c.paint(crown, COLORS["yellow"])


_PARTS: dict[str, Callable[[Canvas, tuple[tuple[float, float], ...]], None]] = {
    "hat": _hat,
    "flag": _flag,
    "horns": _horns,
    "face": _face,
    "halo": _halo,
    "star": _star,
    "scarf": _scarf,
    "crown": _crown,
}
