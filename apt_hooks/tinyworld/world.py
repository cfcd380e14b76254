"""The tiny world: what its scenes hold, and the plain English that describes them."""

from __future__ import annotations

import dataclasses
import random

KINDS = ("ball", "house", "car", "fish", "tree", "boat", "cup", "mushroom")
COLORS = {
    "red": (0.86, 0.16, 0.16),
    "yellow": (0.97, 0.82, 0.16),
    "green": (0.18, 0.66, 0.28),
    "blue": (0.16, 0.36, 0.88),
    "purple": (0.60, 0.24, 0.74),
    "white": (0.96, 0.96, 0.96),
}
SIZES = ("small", "big")
PLACES = {"on the left": 18.0, "in the middle": 32.0, "on the right": 46.0}
BACKGROUNDS = {
    "beach": "at the beach",
    "forest": "in the forest",
    "snow": "in the snow",
    "desert": "in the desert",
    "night": "at night",
    "city": "in the city",
}
STYLES = ("photo", "drawing", "painting")
SECONDS = ("sun", "cloud", "balloon", "bird")
PATTERNS = ("stripes", "bands", "dots", "checks", "rings", "halves", "zigzag")
PARTS = ("hat", "flag", "horns", "face", "halo", "star", "scarf", "crown")
RARE_WORDS = ("sks", "ohwx")
"""Words without a meaning: pretraining puts them beside nouns at random, as the web does with rare ones."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """The main object. Without a pattern and parts it is of the kind that pretraining shows.

    `pattern` paints `second_color` over the body, one of `PATTERNS`; `parts` are some of `PARTS`.
    """

    kind: str
    color: str
    pattern: str | None = None
    second_color: str = "white"
    parts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Scene:
    """All that a caption can say of a picture. `second` is one of `SECONDS`, in the sky, or None."""

    subject: Subject
    size: str
    place: str
    background: str
    style: str = "photo"
    second: str | None = None

    def caption(self, *, rare_word: str | None = None, color: bool = True, size: bool = True) -> str:
        """For example "a photo of a small red ball on the left at the beach with a cloud".

        Args:
            rare_word: stands before the noun, as an identifier does in DreamBooth's captions.
            color, size: whether the caption tells them.
        """
        words = ["a", self.style, "of", "a"]
        if size:
            words.append(self.size)
        if color:
            words.append(self.subject.color)
        if rare_word:
            words.append(rare_word)
        words += [self.subject.kind, self.place, BACKGROUNDS[self.background]]
        if self.second:
            words += ["with", "a", self.second]
        return " ".join(words)


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    phrases = (*KINDS, *COLORS, *SIZES, *PLACES, *BACKGROUNDS.values(), *STYLES, *SECONDS, *RARE_WORDS)
    return sorted({word for phrase in phrases for word in phrase.split()} | {"a", "of", "with"})


def is_held_out(scene: Scene) -> bool:
    """Whether pretraining never shows this combination of kind, color and background: one in eight."""
    kind = KINDS.index(scene.subject.kind)
    color, background = list(COLORS).index(scene.subject.color), list(BACKGROUNDS).index(scene.background)
    return (kind + 3 * color + 5 * background) % 8 == 0


def random_scene(rng: random.Random, subject: Subject | None = None) -> Scene:
    """A scene with everything at random; a given subject is kept."""
    return Scene(
        subject=subject or Subject(rng.choice(KINDS), rng.choice(list(COLORS))),
        size=rng.choice(SIZES),
        place=rng.choice(list(PLACES)),
        background=rng.choice(list(BACKGROUNDS)),
        style=rng.choices(STYLES, weights=(2, 1, 1))[0],
        second=rng.choice((None, *SECONDS)),
    )
