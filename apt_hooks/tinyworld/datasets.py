"""The scenes that pretraining and the judges' training see, and those that are held out."""

from __future__ import annotations

import random

from .concepts import CONCEPTS
from .world import COLORS, KINDS, PARTS, PATTERNS, Scene, Subject, is_held_out, random_scene


def random_subject(rng: random.Random) -> Subject:
    """A patterned subject with one or two parts, as pretraining never shows it; never one of the numbered concepts."""
    while True:
        color, second = rng.sample(list(COLORS), 2)
        parts = tuple(sorted(rng.sample(PARTS, rng.choice((1, 2)))))
        subject = Subject(rng.choice(KINDS), color, rng.choice(PATTERNS), second, parts)
        if subject not in [concept.subject for concept in CONCEPTS]:
            return subject


def draw_scenes(count: int, seed: int, *, subjects: bool = False) -> list[Scene]:
    """Scenes that pretraining may see; with `subjects` half of them show a patterned subject (the autoencoder's)."""
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng, random_subject(rng) if subjects and rng.random() < 0.5 else None)
        if scene.subject.pattern or not is_held_out(scene):
            scenes.append(scene)
    return scenes


def held_out_scenes(count: int, seed: int, *, subjects: bool = False) -> list[Scene]:
    """Scenes that pretraining never shows; with `subjects` every other one shows a patterned subject."""
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng, random_subject(rng) if subjects and len(scenes) % 2 else None)
        if scene.subject.pattern or is_held_out(scene):
            scenes.append(scene)
    return scenes
