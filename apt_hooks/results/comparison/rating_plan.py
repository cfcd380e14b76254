"""What a rater is asked, about which pictures, in which order.

The layout is that of the user study of APT's paper (arXiv 2507.02687): a reference photo, the base model's picture
("prior") of the same prompt and seed, and below them the methods' pictures in random order, judged by three criteria.
The wording of its questions is not public; `QUESTIONS` are ours. So is "cannot tell", an answer that counts for no
method. Raters read the prompt without the identifier ("a backpack in the snow"), which would mean nothing to them.

Raters are blind: they get each picture under an id that is made of its file, and who has the files finds the method of
an id again. So there is no key to keep apart, or to lose. An id tells nothing to who has not the files, for what raters
get are their pixels alone; it is no secret from somebody who guesses LoRAs' names to try them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

from apt_hooks.errors import AptError

from .folders import Comparison

FEWEST, MOST = 2, 6  # methods side by side


@dataclasses.dataclass(frozen=True)
class Question:
    """A criterion: its name in the votes' file, and what the rater reads."""

    criterion: str
    text: str
    hint: str


QUESTIONS = (
    Question("subject", "Which shows the subject of the photo best?", "Compare with the photo."),
    Question("prompt", "Which follows the text best?", "Read the text above the pictures."),
    Question(
        "prior",
        "Which keeps most of what the base model would draw: style, variety, scene?",
        "Whether the subject is the same does not matter.",
    ),
)


@dataclasses.dataclass(frozen=True)
class Item:
    """One page of pictures: a prompt (its index) and a seed."""

    prompt: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Shown:
    """An item as one rater sees it: `candidates` are the methods from left to right."""

    item: Item
    candidates: tuple[str, ...]


class RatingPlan:
    """Items of a comparison, and the order of them and of their candidates for each rater.

    Args:
        comparison: the methods whose pictures are judged, two to six.
        seed: another seed, another order; with the same one a rater finds the same order again.

    Raises:
        AptError: fewer or more methods; no reference photo.
    """

    def __init__(self, comparison: Comparison, seed: int) -> None:
        self.comparison = comparison
        self.methods = tuple(comparison.methods)
        if not FEWEST <= len(self.methods) <= MOST:
            raise AptError(
                f"raters compare {FEWEST} to {MOST} methods, found {len(self.methods)} ({', '.join(self.methods)}); "
                "choose some by --methods, or name a further folder"
            )
        if not comparison.references:
            raise AptError("raters need a photo of the subject to compare with; name a folder by --references")
        self.seed = seed
        self.items = tuple(Item(p, s) for p in range(len(comparison.prompts)) for s in comparison.seeds)

    def order(self, rater: str) -> list[Shown]:
        """The items in this rater's order, each with its candidates in this rater's order; a page numbers its orders.

        Among each as many items in a row as there are methods, every method is once at every place, so that a liking
        for the left or the middle favors none, however early a rater stops.
        """
        chance = random.Random(f"{self.seed}/{rater}")
        items = chance.sample(self.items, len(self.items))
        shown: list[Shown] = []
        while len(shown) < len(items):
            turns = _turns(chance.sample(self.methods, len(self.methods)))
            chance.shuffle(turns)
            shown += [Shown(item, turn) for item, turn in zip(items[len(shown) :], turns, strict=False)]
        return shown

    def reference(self, item: Item) -> int:
        """Index of the photo beside an item: the same for all raters."""
        return random.Random(f"{self.seed}/{item.prompt}/{item.seed}").randrange(len(self.comparison.references))


def picture_ids(comparison: Comparison) -> dict[tuple[int, int, str | None], str]:
    """The id of each picture, by prompt, seed and method (None: the base model)."""
    return {
        (prompt, seed, method): _id(repr((prompt, seed, method)), comparison.picture(method, prompt, seed))
        for prompt in range(len(comparison.prompts))
        for seed in comparison.seeds
        for method in (None, *comparison.methods)
    }


def _id(name: str, file: Path) -> str:
    try:
        return hashlib.blake2b(name.encode() + file.read_bytes(), digest_size=9).hexdigest()
    except OSError as error:
        raise AptError(f"{file}: cannot be read: {error.strerror}") from error


def _turns(methods: Sequence[str]) -> list[tuple[str, ...]]:
    """A Latin square: the methods in every rotation."""
    return [(*methods[i:], *methods[:i]) for i in range(len(methods))]
