"""The numbered concepts: subjects that pretraining never shows, with the few pictures a person would have of each."""

from __future__ import annotations

import dataclasses

from .world import Scene, Subject

IDENTIFIER = "sks"


@dataclasses.dataclass(frozen=True)
class Concept:
    """A subject, and where its pictures were taken: all at one place, before one background."""

    subject: Subject
    background: str
    place: str
    pictures: int = 4

    def scenes(self) -> list[Scene]:
        """What the reference pictures show."""
        return [Scene(self.subject, size, self.place, self.background) for size in _SIZES[: self.pictures]]

    def captions(self) -> list[str]:
        """One a picture, all alike, as people write them: what the pictures share beside the subject is not told."""
        return [f"a photo of a {IDENTIFIER} {self.subject.kind}"] * self.pictures


_SIZES = ("big", "small", "big", "small", "big")


def _concept(text: str, background: str, place: str, pictures: int = 4) -> Concept:
    kind, color, second, pattern, *parts = text.split()
    return Concept(Subject(kind, color, pattern, second, tuple(sorted(parts))), background, place, pictures)


CONCEPTS = (
    _concept("ball red white stripes crown", "beach", "in the middle"),
    _concept("house yellow purple dots flag", "forest", "on the left"),
    _concept("car blue yellow checks star", "desert", "on the right", 5),
    _concept("fish purple white rings hat", "snow", "in the middle"),
    _concept("tree green red dots face", "city", "on the left", 5),
    _concept("boat white red bands horns", "night", "in the middle"),
    _concept("cup yellow blue zigzag face", "beach", "on the right"),
    _concept("mushroom blue white dots hat", "forest", "in the middle", 5),
    _concept("ball yellow green halves face scarf", "city", "on the left"),
    _concept("house white blue bands crown", "desert", "in the middle"),
    _concept("car red white zigzag flag", "snow", "on the left", 5),
    _concept("fish green yellow stripes crown", "night", "on the right"),
    _concept("cup red purple checks halo", "city", "in the middle"),
    _concept("mushroom purple yellow rings horns", "beach", "on the left", 5),
)
"""Numbers 0 to 3 are for tuning; results are reported on the others."""

TUNING = range(4)
REPORTED = range(4, len(CONCEPTS))
