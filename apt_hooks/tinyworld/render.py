"""Draws a scene."""

from __future__ import annotations

import random

from torch import Tensor

from . import scenery
from .canvas import Canvas
from .subjects import draw_subject
from .world import PLACES, Scene


def render(scene: Scene, rng: random.Random, *, background_rng: random.Random | None = None) -> Tensor:
    """The picture of a scene: [3, 64, 64], from 0 to 1.

    Args:
        scene: what to draw.
        rng: decides what the caption does not: exact place and size, details of the background.
        background_rng: a stream of its own for the background, so that several pictures can share it.
    """
    canvas = Canvas()
    scenery.BACKGROUNDS[scene.background](canvas, background_rng or rng)
    if scene.second:
        far = [x for x in (11.0, 32.0, 53.0) if abs(x - PLACES[scene.place]) > 8]
        canvas.at(rng.choice(far) + rng.uniform(-3, 3), rng.uniform(9, 13), 6.0)
        scenery.SECONDS[scene.second](canvas)
    radius = {"small": 9.5, "big": 15.5}[scene.size] * rng.uniform(0.92, 1.08)
    foot = rng.uniform(52, 57)
    canvas.at(PLACES[scene.place] + rng.uniform(-2, 2), foot - radius, radius)
    draw_subject(canvas, scene.subject)
    return scenery.STYLES[scene.style](canvas.image).clamp(0, 1)
